"""The product of W8A8: int8 weights with inputs that are rounded to int8 token by token while the model runs."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

# Extreme values on both sides: pairs of products that are summed in 16 bits somewhere would saturate.
_PROBE = (32, 64, 16)


class Tokens(NamedTuple):
    """Rounded inputs x: (values - zero_point) * scale.

    Attributes:
        values: int8, of the input's shape.
        scale: (..., 1) in the input's dtype.
        zero_point: int8 (..., 1); None where it is 0 for all.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def rounded(self) -> Tensor:
        """What the integers stand for, in the dtype of the scales."""
        values = self.values if self.zero_point is None else self.values.to(self.scale.dtype) - self.zero_point
        return values * self.scale


def int8_linear(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    *,
    symmetric: bool,
    sums: Tensor | None = None,
) -> Tensor:
    """x W^T + b with x rounded by `quantize_tokens`.

    The integers are those that compressed-tensors' forward rounds to; their product is summed exactly and scaled in
    float32 (float64 for float64 inputs), where compressed-tensors multiplies rounded floats.

    Args:
        input: (..., in_features), any float dtype.
        weight: int8 (out_features, in_features).
        scale: (out_features,) or (out_features, 1).
        bias: (out_features,) or None.
        symmetric: whether x is rounded without a zero point.
        sums: int32 (out_features,), of the weight's rows, where they are known.

    Returns:
        (..., out_features) in the dtype of the input, or autocast's where that is on.
    """
    # Two dimensions until the end: torch.compile fuses scales with a product that is reshaped in between, wrongly so on
    # CPUs (torch 2.13).
    tokens = quantize_tokens(input.reshape(-1, input.shape[-1]), symmetric)
    wide = torch.promote_types(input.dtype, torch.float32)
    product = int8_product(tokens.values, weight)
    if tokens.zero_point is not None:
        sums = weight.sum(-1, dtype=torch.int32) if sums is None else sums
        product = product - tokens.zero_point.to(product.dtype) * sums.to(product.dtype)
    output = product.to(wide).mul_(tokens.scale.to(wide)).mul_(scale.to(wide).view(-1))
    if bias is not None:
        output += bias.to(wide)
    output = output.view(*input.shape[:-1], len(weight))
    kind = input.device.type
    return output.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype)


def quantize_tokens(input: Tensor, symmetric: bool) -> Tokens:
    """Round every token to int8 over its own range, as compressed-tensors does (in the input's dtype).

    Only for inputs of two dimensions there is a difference: they have one scale for all in compressed-tensors 0.20, so
    that a row's result would depend on its neighbours; here every row has its own.

    Args:
        input: (..., features), any float dtype.
        symmetric: the range is [-max|x|, max|x|]; otherwise from the smallest to the largest value, with 0 inside.
    """
    x = input.detach()
    if symmetric:
        scale = _positive(x.abs().amax(-1, keepdim=True) / 127.5)
        return Tokens((x / scale).clamp_(-128, 127).round_().to(torch.int8), scale, None)
    lowest, highest = x.amin(-1, keepdim=True).clamp_max_(0), x.amax(-1, keepdim=True).clamp_min_(0)
    scale = (highest - lowest) / 255
    if x.dtype == torch.float16:  # which ends before some ranges do
        scale = torch.where(scale.isinf(), highest / 255 - lowest / 255, scale)
    zero_point = torch.where(scale == 0, -128, -128 - lowest / scale).clamp_(-128, 127).round_()
    scale = _positive(scale)
    return Tokens(
        (x / scale).add_(zero_point).clamp_(-128, 127).round_().to(torch.int8), scale, zero_point.to(torch.int8)
    )


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)


def int8_product(values: Tensor, weight: Tensor) -> Tensor:
    """(tokens, in) int8 times (out, in) int8 transposed: (tokens, out) int32 where the device multiplies integers.

    Elsewhere float32, of the same numbers: exact up to 1024 input features, rounded at 24 bits above that.
    """
    tokens, features = values.shape
    if values.is_cuda:  # its kernel takes more than 16 rows and widths of whole eights
        if features % 8 or len(weight) % 8:
            return values.float() @ weight.float().T
        values = torch.nn.functional.pad(values, (0, 0, 0, max(0, 17 - tokens)))
    if multiplies_int8(values.device):
        return torch._int_mm(values, weight.T)[:tokens]
    return values[:tokens].float() @ weight.float().T


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def multiplies_int8(device: torch.device) -> bool:
    """Whether `torch._int_mm` is there on a device, and exact: found by trying."""
    return _multiplies_int8(device)


@cache
def _multiplies_int8(device: torch.device) -> bool:
    if device.type == "meta":
        return False
    rows, inner, columns = _PROBE
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 2, (rows, inner), generator=generator) * 255 - 128
    values[0] = -128
    weight = torch.randint(0, 2, (columns, inner), generator=generator) * 255 - 128
    weight[0], weight[1] = -128, 127
    try:
        found = torch._int_mm(values.to(device, torch.int8), weight.to(device, torch.int8).T)
    except RuntimeError:
        return False
    return torch.equal(found.cpu().long(), values @ weight.T)
