"""Compressed-tensors checkpoints of other tools, as stock transformers loads them: their Linears become ours."""

from __future__ import annotations

from typing import cast

from compressed_tensors.quantization import QuantizationScheme, QuantizationStatus
from torch import nn

from hf_shrink.checkpoint.packed import scheme_of
from hf_shrink.errors import CheckpointError
from hf_shrink.runtime import CompressedLinear
from hf_shrink.runtime.packed import CHECKPOINT_BUFFERS
from hf_shrink.scheme import Scheme

_HOOK = "ct_decompress_hook"  # compressed-tensors' own: it makes everything dense before the first forward pass


def take_over(model: nn.Module) -> None:
    """Put packed Linears of ours where compressed-tensors holds packed ones, in place; tensors and names stay.

    Raises:
        CheckpointError: some can be taken over and others cannot, or the model was run already, so that it is dense.
    """
    stock = {path: module for path, module in model.named_modules() if hasattr(module, "quantization_scheme")}
    if not stock:
        return
    if any(module.quantization_status != QuantizationStatus.COMPRESSED for module in stock.values()):
        raise CheckpointError(
            "compressed-tensors has made these weights dense already, as it does before the first forward pass; load "
            "the model again and optimize it before it runs"
        )
    schemes = {path: _scheme(path, module) for path, module in stock.items()}
    for path, module in stock.items():
        model.set_submodule(path, _linear(module, schemes[path]))
    for part in model.modules():
        if _HOOK in vars(part):
            vars(part).pop(_HOOK).remove()


def _scheme(path: str, module: nn.Module) -> Scheme:
    stock = cast(QuantizationScheme, module.quantization_scheme)
    if type(module) is not nn.Linear or stock.weights is None or not hasattr(module, "weight_packed"):
        raise CheckpointError(
            f"{path} is a {type(module).__name__} stored as {stock.format}; only Linears packed to 2 to 8 bit integers "
            "can be optimized: leave the model to compressed-tensors"
        )
    if hasattr(module, "weight_g_idx"):
        raise CheckpointError(
            f"the columns of {path} are stored in another order (weight_g_idx); it cannot be optimized"
        )
    return scheme_of(stock.weights, stock.input_activations)


def _linear(module: nn.Module, scheme: Scheme) -> CompressedLinear:
    stored = {name: getattr(module, name) for name in CHECKPOINT_BUFFERS if hasattr(module, name)}
    bias = module._parameters.get("bias")
    linear = CompressedLinear.empty(
        scheme,
        cast(int, module.in_features),
        cast(int, module.out_features),
        bias=bias is not None,
        dtype=stored["weight_scale"].dtype,
        device="meta",
    )
    wanted = linear.state_dict()
    for name, tensor in stored.items():
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(f"{name} is of shape {tuple(tensor.shape)} where {tuple(wanted[name].shape)} is due")
        setattr(linear, name, tensor.detach())
    if bias is not None:
        linear.bias = bias
    linear.train(module.training)
    return linear
