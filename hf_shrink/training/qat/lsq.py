"""Learned step size quantization (LSQ, Esser et al., arXiv 1902.08153) as an autograd function.

A weight w is computed with as (q - zero_point) * s, q = clamp(round(w / s) + zero_point): exactly what would be stored.
The step s is learned: its gradient is that of the rounding error inside the range of the integers and of the clamped
integer outside, times 1 / sqrt(weights that share s * largest integer). The gradient of w passes straight through
inside the range, and is zero outside.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hf_shrink.ops.grid import Grid, dequantize, integer_range, quantize, stored_scale
from hf_shrink.scheme import Scheme


def step_grid(scheme: Scheme, step: Tensor, unit: Tensor, zero_point: Tensor | None, scale_dtype: torch.dtype) -> Grid:
    """The grid of the scales unit * step, rounded to the dtype that they are stored in."""
    return Grid(scheme, stored_scale(unit * step, scale_dtype), zero_point)


def fake_quantize(
    weight: Tensor, step: Tensor, unit: Tensor, zero_point: Tensor | None, scheme: Scheme, scale_dtype: torch.dtype
) -> Tensor:
    """The weight as it would be stored, in its own dtype, with LSQ's gradients to itself and to `step`.

    `step` is the scale in units of `unit`, so that an optimizer whose moves do not depend on the size of gradients
    (Adam) moves a scale by as much of itself as it moves a weight. Its gradient is divided, not multiplied, by the
    unit: plain gradient descent then moves the scale unit * step as LSQ says, whatever the unit is.

    Args:
        weight: (out_features, in_features), any float dtype.
        step: (rows, groups) float32; rows and groups as of `Grid.scale`.
        unit: like `step`, never zero; negative where the scale is.
        zero_point: int8, like `step`; None when symmetric.
        scheme: integers, with a group size that divides in_features.
        scale_dtype: that the scales are stored in. Rounding to it passes gradients through.
    """
    fake: Tensor = _FakeQuantize.apply(weight, step, unit, zero_point, scheme, scale_dtype)  # type: ignore[no-untyped-call]
    return fake


def gradient_scale(scheme: Scheme, rows: int, columns: int) -> float:
    """LSQ's factor on the gradient of a step of a weight (rows, columns)."""
    sharing = {"tensor": rows * columns, "channel": columns, "group": scheme.group_size or columns}[scheme.strategy]
    lowest, highest = integer_range(scheme.bits)
    return 1 / math.sqrt(sharing * (highest if scheme.symmetric else highest - lowest))


def idle(weight: Tensor, step: Tensor) -> Tensor:
    """The weight as it is, with a gradient of zero to `step`: DDP waits for the gradient of every parameter."""
    same: Tensor = _Idle.apply(weight, step)  # type: ignore[no-untyped-call]
    return same


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        step: Tensor,
        unit: Tensor,
        zero_point: Tensor | None,
        scheme: Scheme,
        scale_dtype: torch.dtype,
    ) -> Tensor:
        grid = step_grid(scheme, step, unit, zero_point, scale_dtype)
        ctx.save_for_backward(weight, grid.scale, unit, zero_point)
        ctx.scheme = scheme
        return dequantize(quantize(weight, grid), grid).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, unit, zero_point = ctx.saved_tensors
        scheme: Scheme = ctx.scheme
        lowest, highest = integer_range(scheme.bits)
        groups = (-1, scheme.group_size or weight.shape[1])
        to_fake = gradient.float().reshape(groups)
        zero = 0.0 if zero_point is None else zero_point.float().view(-1, 1)
        places = weight.float().reshape(groups) / scale.float().view(-1, 1) + zero
        inside = (places >= lowest) & (places <= highest)
        to_weight = to_step = None
        if ctx.needs_input_grad[0]:
            to_weight = (to_fake * inside).view(weight.shape).to(weight.dtype)
        if ctx.needs_input_grad[1]:
            slope = places.round().clamp_(lowest, highest) - torch.where(inside, places, zero)
            of_group = (to_fake * slope).sum(1)
            to_scale = of_group.sum().view(1, 1) if scheme.strategy == "tensor" else of_group.view(unit.shape)
            to_step = to_scale * gradient_scale(scheme, *weight.shape) / unit
        return to_weight, to_step, None, None, None, None


class _Idle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor) -> Tensor:
        ctx.save_for_backward(step)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (step,) = ctx.saved_tensors
        return gradient, torch.zeros_like(step)
