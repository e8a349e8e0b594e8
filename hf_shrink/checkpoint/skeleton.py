"""Turn the skeleton that transformers builds (meta device) into the one that a checkpoint of ours fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_shrink.architectures import bind
from hf_shrink.checkpoint.packed import packed_modules, scheme_of
from hf_shrink.checkpoint.portability import stock_kinds
from hf_shrink.checkpoint.ties import packed_buffers, tie_weights, tied_modules
from hf_shrink.errors import CheckpointError
from hf_shrink.plan import Scheme
from hf_shrink.runtime import CompressedEmbedding, CompressedLinear, PackedModule
from hf_shrink.runtime.experts import packs_experts, separate_experts, separate_modules
from hf_shrink.surgery import module_shape, resize_skeleton


def marker(config: PretrainedConfig) -> dict[str, Any] | None:
    """The `hf_shrink` block of a config that carries one."""
    found = getattr(config, "hf_shrink", None)
    return found if isinstance(found, dict) else None


def resize(model: PreTrainedModel) -> None:
    """Give the skeleton the shapes and attributes of its config's marker, in place.

    The marker names modules as in the class that was saved; the bare model lacks the base prefix, a model with a head
    adds it.

    Raises:
        ArchitectureError: the marker names a module that the model does not have, or is of a later format.
    """
    record = dict(marker(model.config) or {})
    for key in ("shapes", "attributes", "absent", "experts"):
        record[key] = {_local(model, path): value for path, value in record.get(key, {}).items()}
    resize_skeleton(model, record)


def _local(model: PreTrainedModel, path: str) -> str:
    """The path as it is in this model, with or without the base prefix; unchanged where neither exists."""
    prefix = f"{model.base_model_prefix}."
    for form in (path, path.removeprefix(prefix), prefix + path):
        try:
            model.get_submodule(form)
        except AttributeError:
            continue
        return form
    return path


def targeted(model: nn.Module, config: QuantizationConfig) -> dict[str, Scheme]:
    """The scheme of every module that the block targets, by path."""
    found = {}
    for path, module in model.named_modules():
        for group in config.config_groups.values():
            if module_shape(module) is not None and is_match(path, module, group.targets, config.ignore or ()):
                found[path] = scheme_of(group.weights, group.input_activations)
    return found


def take_experts_apart(model: PreTrainedModel, config: QuantizationConfig) -> None:
    """Give experts one Linear a matrix where the block targets any of these, in place."""
    undo = separate_experts(model)
    if separate_modules(model) and not packs_experts(bind(model), targeted(model, config)):
        undo()


def pack(model: PreTrainedModel, schemes: Mapping[str, Scheme]) -> None:
    """Put empty compressed modules at the paths of `schemes`, in place; biases stay."""
    for path, scheme in schemes.items():
        model.set_submodule(path, empty_compressed(model.get_submodule(path), scheme))


def empty_compressed(module: nn.Module, scheme: Scheme) -> PackedModule:
    """A compressed module of another one's shape, dtype, device and bias, without values.

    Args:
        module: Linear, Conv1D (becomes a Linear, its weight transposed) or Embedding.
    """
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    if isinstance(module, nn.Embedding):
        return CompressedEmbedding.empty(
            scheme,
            module.num_embeddings,
            module.embedding_dim,
            padding_idx=module.padding_idx,
            dtype=weight.dtype,
            device=weight.device,
        )
    shape = module_shape(module)
    assert shape is not None
    return CompressedLinear.empty(
        scheme,
        shape[1],
        shape[0],
        bias=getattr(module, "bias", None) is not None,
        dtype=weight.dtype,
        device=weight.device,
    )


def check_loaded(model: nn.Module) -> None:
    """Raises CheckpointError when a packed weight is absent, of another shape, or has scales that are not finite."""
    dispatched = len(set((getattr(model, "hf_device_map", None) or {"": 0}).values())) > 1
    for path, module in packed_modules(model).items():
        for name, buffer in packed_buffers(module).items():
            # transformers marks what it loaded, leaves the rest as it is in memory, and only warns; moving a model
            # over several devices loses the marks.
            if not dispatched and not getattr(buffer, "_is_hf_initialized", False):
                lost = module.checkpoint_names.get(name, name)
                raise CheckpointError(f"the checkpoint lacks {path}.{lost}; download or save it again")
        if module.weight_scale.is_meta:
            continue
        stored = None if module.weight_shape is None else [int(n) for n in module.weight_shape]
        if stored is not None and stored != list(module_shape(module) or ()):
            raise CheckpointError(
                f"{path}.weight_shape is {stored} where {module_shape(module)} is due; the checkpoint is damaged or "
                "incomplete: download it again"
            )
        damaged = [] if torch.isfinite(module.weight_scale).all() else ["weight_scale"]
        if module.scheme.type == "float" and module.weight_packed.float().isnan().any():
            damaged.append("weight")
        for name in damaged:
            raise CheckpointError(f"{path}.{name} holds NaN or Inf; the checkpoint is damaged: download it again")


def unpack(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Put dense modules of the stock classes where the compressed ones are, in place."""
    packed, pairs = packed_modules(model), tied_modules(model)
    kinds = stock_kinds(model, packed)
    for path, module in packed.items():
        model.set_submodule(path, _dense(module, kinds[path], dtype))
    tie_weights(model, pairs)


def _dense(module: PackedModule, kind: type, dtype: torch.dtype) -> nn.Module:
    weight = nn.Parameter(module.weight.detach().to(dtype))
    rows, columns = weight.shape
    dense: Any
    with torch.device("meta"):
        if isinstance(module, CompressedEmbedding):
            dense = nn.Embedding(rows, columns, padding_idx=module.padding_idx)
        elif issubclass(kind, Conv1D):
            dense, weight = kind(rows, columns), nn.Parameter(weight.data.T.contiguous())
        else:
            dense = nn.Linear(columns, rows, bias=False)
    dense.weight = weight
    if isinstance(module, CompressedLinear):
        dense.bias = module.bias
    return cast(nn.Module, dense)
