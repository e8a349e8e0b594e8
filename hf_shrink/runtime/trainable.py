"""A packed Linear laid open for training: its scales, zero points and, where asked, its rounding.

The forward pass computes with exactly the weight that would be stored now. Gradients pass through every rounding as if
it were not there (straight-through estimator, Bengio et al., arXiv 1308.3432).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_shrink.ops.grid import Grid, nearest_, stored_scale, value_dtype
from hf_shrink.ops.quantized import QuantizedWeight
from hf_shrink.plan import Scheme
from hf_shrink.runtime.int8 import quantize_tokens
from hf_shrink.runtime.linear import CompressedLinear

_INSIDE = 0.25  # of a step: how far from its integer a rounding may start, so that it does not turn at once


class TrainableLinear(nn.Module):
    """y = x W^T + b with W = (q - zero_point) * scale, all of it float32 parameters of a few kinds.

    Attributes:
        log_scale: (rows, groups, 1) float32 parameter a; the scale is (start of training) * exp(a).
        zero: (rows, groups, 1) float32 parameter that is rounded to an integer; None for symmetric schemes.
        steps: (rows, groups, columns in a group) float32 parameter that is rounded and clamped to the scheme's values;
            a buffer of these, int8 or float8_e4m3fn, when the rounding is not trained. float8 values, far apart where
            they are large, hardly turn: what is learned under FP8A16 are the scales.
        kept: bool, as `steps`: all other weights are zero and stay zero; None where the weight was not pruned.
        bias: the packed module's, or None.

    Args:
        packed: what to start from. Is not changed.
        rounding: whether the integers are trained.
        dense: (out, in): the weight that was rounded. Given, a weight whose rounding is trained starts on its side of
            the integer that it has; otherwise on the integer.
    """

    steps: Tensor
    initial_scale: Tensor
    kept: Tensor | None

    def __init__(self, packed: CompressedLinear, *, rounding: bool = False, dense: Tensor | None = None) -> None:
        super().__init__()
        self.scheme, self.scale_dtype = packed.scheme, packed.weight_scale.dtype
        self.in_features, self.out_features = packed.in_features, packed.out_features
        self.bias = packed.bias
        values, grid = packed.unpacked()
        rows = 1 if self.scheme.strategy == "tensor" else self.out_features
        layout = (self.out_features, self.scheme.scale_columns(self.in_features), -1)
        scale = grid.scale.float().view(rows, -1, 1)
        self.register_buffer("initial_scale", scale)
        self.log_scale = nn.Parameter(torch.zeros_like(scale))
        self.zero = None if grid.zero_point is None else nn.Parameter(grid.zero_point.float().view(rows, -1, 1))
        zero = 0 if grid.zero_point is None else grid.zero_point.view(rows, -1, 1)
        self.register_buffer("kept", values.view(layout) != zero if packed.sparse else None)
        if not rounding:
            self.register_buffer("steps", values.view(layout))
            return
        steps = values.view(layout).float()
        if dense is not None and self.scheme.type == "int":
            wanted = dense.detach().float().view(layout) / scale
            wanted = wanted if self.zero is None else wanted + self.zero.detach()
            steps += _INSIDE * (wanted - steps).clamp(-1, 1)
        self.steps = nn.Parameter(steps)

    @property
    def weight(self) -> Tensor:
        """(out, in) float32, with gradients to the parameters."""
        steps = self._values()
        if self.zero is not None:
            steps = steps - self._zero_point()
        return (steps * self._scale()).view(self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Linear, on (..., in_features). With 8-bit activations the input is rounded."""
        if self.scheme.activation_bits == 8:
            rounded = quantize_tokens(input, self.scheme.activation_symmetric).rounded()
            input = input + (rounded - input).detach()
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)

    def quantized(self) -> QuantizedWeight:
        """The weight as it is now, to be packed."""
        with torch.no_grad():
            scale = stored_scale(self.initial_scale * self.log_scale.exp(), self.scale_dtype)
            rows = 1 if self.scheme.strategy == "tensor" else self.out_features
            zero = None if self.zero is None else self._zero_point().to(torch.int8).view(rows, -1)
            grid = Grid(self.scheme, scale.view(rows, -1), zero)
            values = self._values().to(value_dtype(self.scheme)).view(self.out_features, self.in_features)
        return QuantizedWeight(values, grid, 0.0, sparse=self.kept is not None)

    def packed(self) -> CompressedLinear:
        """A packed module with the weight as it is now and the same bias."""
        return CompressedLinear.from_quantized(self.quantized(), self.bias)

    def _scale(self) -> Tensor:
        scale = self.initial_scale * self.log_scale.exp()
        if self.scale_dtype == torch.float32:
            return scale
        return scale + (stored_scale(scale.detach(), self.scale_dtype).float() - scale.detach())

    def _zero_point(self) -> Tensor:
        assert self.zero is not None
        rounded: Tensor = _Round.apply(self.zero, self.scheme)  # type: ignore[no-untyped-call]
        return rounded

    def _values(self) -> Tensor:
        """What would be stored now, in float32."""
        if not isinstance(self.steps, nn.Parameter):
            rounded = self.steps.float()
        else:
            rounded = _Round.apply(self.steps, self.scheme)  # type: ignore[no-untyped-call]
        if self.kept is None:
            return rounded
        return torch.where(self.kept, rounded, 0.0 if self.zero is None else self._zero_point())


class _Round(torch.autograd.Function):
    """Round and clamp; the gradient passes as it is, so that what was clamped can come back."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, scheme: Scheme) -> Tensor:
        return nearest_(value.clone(), scheme)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
