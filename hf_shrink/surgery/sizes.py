"""Write a model's present sizes into its config, and build a skeleton back from there.

Uniform sizes go into the stock config keys. What those keys cannot say (different sizes in different blocks, head
counts of families that derive the head size) is recorded by module path in `config.hf_shrink`, which the loader reads.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from hf_shrink.architectures.absent import PARTS, is_absent, part_of, take_parts
from hf_shrink.architectures.binding import Binding, bind, family_of, same_family
from hf_shrink.architectures.bound import BoundMlp
from hf_shrink.architectures.linears import resize
from hf_shrink.architectures.portable import part_keys
from hf_shrink.errors import ArchitectureError
from hf_shrink.runtime.experts import separate_experts, separate_modules
from hf_shrink.surgery.depth import stack_configs
from hf_shrink.surgery.expert_channels import channel_counts, resize_experts
from hf_shrink.surgery.experts import settle_experts
from hf_shrink.surgery.units import CONFIG_PREFIX, get_attribute, set_attribute

RECORD_FORMAT = 1


def settle_config(model: PreTrainedModel) -> None:
    """Write the model's present sizes into its config: stock keys where all blocks agree, `hf_shrink` for the rest."""
    if family_of(model) is None:
        # Such a model is never cut; and once its weights are packed, its blocks can no longer be found by search.
        model.config.hf_shrink = {"format": RECORD_FORMAT, "shapes": {}, "attributes": {}}
        return
    binding = bind(model)
    settle_experts(model, binding)
    _settle_stock_keys(model, binding)
    _settle_cache_depth(model, binding)
    _share_configs(model, binding)
    model.config.hf_shrink = {"format": RECORD_FORMAT, **_uneven(model, binding)}


@dataclass
class _Wish:
    """What the parts that read the same config keys would have these keys be."""

    keys: list[dict[str, int] | None] = field(default_factory=list)
    configs: list[PretrainedConfig] = field(default_factory=list)
    changed: bool = False


def _settle_stock_keys(model: PreTrainedModel, binding: Binding) -> None:
    """Set the keys of every kind of part whose sizes changed, where all parts agree and stock can build them."""
    built = {part.path: part.sizes for block in bind(build_skeleton(model)).blocks for part in block.parts}
    wishes: dict[tuple[int, str | None], _Wish] = {}
    for stack in binding.stacks:
        configs = stack_configs(model, stack)
        for part in (part for block in stack.blocks for part in block.parts):
            name = part.spec.channels if isinstance(part, BoundMlp) else part.spec.heads
            wish = wishes.setdefault((id(configs[0]), name), _Wish())
            wish.changed |= part.sizes != built[part.path]
            wish.configs += [c for c in configs if all(c is not known for known in wish.configs)]
            keys = part_keys(part, configs[0])
            if keys not in wish.keys:
                wish.keys.append(keys)
    for wish in wishes.values():
        if not wish.changed or len(wish.keys) != 1 or wish.keys[0] is None:
            continue
        for key, value in wish.keys[0].items():
            for config in wish.configs:
                setattr(config, key, value)


def _settle_cache_depth(model: PreTrainedModel, binding: Binding) -> None:
    """See to it that `generate` makes a KV cache for as many blocks as the decoder of an encoder-decoder has.

    `get_text_config(decoder=True)` tells the number. Where a config has `decoder_layers` it takes that, and else the
    encoder's number, which is too few once the encoder is the shorter: then the key is added.
    """
    config = model.config
    for stack in binding.stacks:
        cached = stack.spec is not None and stack.spec.cached and config.is_encoder_decoder
        if cached and config.get_text_config(decoder=True).num_hidden_layers != len(stack.blocks):
            config.decoder_layers = len(stack.blocks)


def _share_configs(model: PreTrainedModel, binding: Binding) -> None:
    """Give modules whose own copy of the config says nothing else the stack's config back."""
    for stack in binding.stacks:
        config = stack_configs(model, stack)[0]
        for part in (part for block in stack.blocks for part in block.parts):
            own = getattr(part.module, "config", None)
            copied = any(name.startswith(CONFIG_PREFIX) for name in part.spec.attributes)
            if copied and isinstance(own, PretrainedConfig) and _without_record(own) == _without_record(config):
                part.module.config = config  # type: ignore[assignment]


def _without_record(config: PretrainedConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key != "hf_shrink"}


def build_skeleton(model: PreTrainedModel, config: PretrainedConfig | None = None) -> PreTrainedModel:
    """What stock transformers builds from the model's config, on the meta device; experts apart as in the model.

    `config`: build from this one instead.
    """
    config = copy.deepcopy(model.config if config is None else config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if isinstance(config.dtype, str):  # as saving leaves it; some models build from it
        config.dtype = getattr(torch, config.dtype)
    with torch.device("meta"), no_init_weights():
        skeleton = type(model)(config)
    same_family(model, skeleton)
    skeleton.tie_weights()
    if separate_modules(model):
        separate_experts(skeleton)
    return skeleton


def module_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of anything with a matrix: Linear, Conv1D, Embedding (rows, width), compressed ones; None otherwise."""
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    if hasattr(module, "out_features") and hasattr(module, "in_features"):
        return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    if hasattr(module, "num_embeddings") and hasattr(module, "embedding_dim"):
        return int(module.num_embeddings), int(module.embedding_dim)  # type: ignore[arg-type]
    return None


def _uneven(model: PreTrainedModel, binding: Binding) -> dict[str, Any]:
    """Shapes and attributes, by module path, in which the model differs from what its config builds."""
    built = build_skeleton(model)
    skeleton, stock = dict(built.named_modules()), channel_counts(bind(built).blocks)
    experts = {path: n for path, n in channel_counts(binding.blocks).items() if n != stock[path]}
    shapes = {}
    for path, module in model.named_modules():
        size = module_shape(module)
        if any(path.startswith(f"{mixture}.") for mixture in experts):
            continue  # what the number of channels says already
        if size is not None and path in skeleton and module_shape(skeleton[path]) != size:
            shapes[path] = list(size)
    attributes: dict[str, dict[str, int]] = {}
    for block in binding.blocks:
        for part in block.parts:
            for name in part.spec.attributes:
                value = get_attribute(part.module, name)
                if get_attribute(skeleton[part.path], name) != value:
                    attributes.setdefault(part.path, {})[name] = value
    more = {"absent": absent_parts(binding), "experts": experts}
    return {"shapes": shapes, "attributes": attributes, **{name: found for name, found in more.items() if found}}


def absent_parts(binding: Binding) -> dict[str, list[str]]:
    """The parts that were taken out of blocks, by the path of the block."""
    absent: dict[str, list[str]] = {}
    for stack in binding.stacks:
        for block in stack.blocks if stack.spec is not None else ():
            assert stack.spec is not None
            for part in PARTS:
                form = part_of(block.module, stack.spec, part)
                if form is not None and is_absent(block.module, form):
                    absent.setdefault(block.path, []).append(part)
    return absent


def resize_skeleton(model: nn.Module, record: Mapping[str, Any]) -> None:
    """The inverse of `settle_config`'s record: give a stock skeleton the recorded shapes and attributes, in place.

    Raises:
        ArchitectureError: the record is of a later format, or names a module that the model does not have.
    """
    if record.get("format") != RECORD_FORMAT:
        raise ArchitectureError(f"this checkpoint's shapes are of format {record.get('format')!r}; update hf_shrink")
    _take_absent(model, record.get("absent", {}))
    _resize_experts(model, record.get("experts", {}))
    modules = dict(model.named_modules())
    for path, size in record.get("shapes", {}).items():
        if path not in modules:
            raise ArchitectureError(f"the checkpoint records a shape for {path}, which {type(model).__name__} lacks")
        rows, columns = (int(n) for n in size)
        module = modules[path]
        if isinstance(module, nn.Embedding):
            module.weight = nn.Parameter(
                torch.empty(rows, columns, dtype=module.weight.dtype, device=module.weight.device)
            )
            module.num_embeddings, module.embedding_dim = rows, columns
        else:
            resize(module, rows, columns)
    for path, values in record.get("attributes", {}).items():
        if path not in modules:
            raise ArchitectureError(f"the checkpoint records attributes of {path}, which {type(model).__name__} lacks")
        for name, value in values.items():
            set_attribute(modules[path], name, int(value))


def _take_absent(model: nn.Module, absent: Mapping[str, list[str]]) -> None:
    if not absent:
        return
    known = {block.path: (stack, block) for stack in bind(model).stacks for block in stack.blocks}
    for path, parts in absent.items():
        if path not in known or any(part not in PARTS for part in parts):
            raise ArchitectureError(f"the checkpoint lacks {parts} of {path}, which {type(model).__name__} has not")
        stack, block = known[path]
        assert stack.spec is not None
        take_parts(block.module, stack.spec, parts)


def _resize_experts(model: nn.Module, channels: Mapping[str, int]) -> None:
    if not channels:
        return
    known = {block.experts.path: block.experts for block in bind(model).blocks if block.experts is not None}
    for path, count in channels.items():
        if path not in known:
            raise ArchitectureError(
                f"the checkpoint records the channels of experts at {path}, which {type(model).__name__} lacks"
            )
        resize_experts(known[path], int(count))


def is_uneven(model: nn.Module) -> bool:
    """Whether the config cannot express the model's shapes."""
    record = getattr(getattr(model, "config", None), "hf_shrink", None) or {}
    return any(record.get(name) for name in ("shapes", "attributes", "absent", "experts"))
