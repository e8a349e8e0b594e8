"""Coordinate descent against a literal float64 loop over rows, scales and integers."""

from __future__ import annotations

import pytest
import torch
from quantization_cases import SCHEMES, case, statistics_of

from hf_shrink.ops.grid import dequantize, integer_range, quantize, search_grid
from hf_shrink.quantization.descent import descend


def literal_descent(weight, values, grid, hessian):
    """One round, one row at a time."""
    low, high = integer_range(grid.scheme.bits)
    width = grid.scheme.group_size or weight.shape[1]
    new_values, new_scale = values.double().clone(), grid.scale.double().expand(len(weight), -1).clone()
    zeros = torch.zeros_like(new_scale) if grid.zero_point is None else grid.zero_point.double().expand_as(new_scale)
    for r, w in enumerate(weight.double()):
        for g in range(new_scale.shape[1]):
            span = slice(g * width, (g + 1) * width)
            zero = zeros[r].repeat_interleave(width)
            steps = new_values[r] - zero
            residual = w - steps * new_scale[r].repeat_interleave(width)
            part = torch.zeros_like(steps)
            part[span] = steps[span]
            if grid.scheme.strategy != "tensor" and part.any():
                best = new_scale[r, g] + (part @ hessian @ residual) / (part @ hessian @ part)
                if best * new_scale[r, g] > 0:
                    new_scale[r, g] = best
            for j in range(span.start, span.stop):
                steps = new_values[r] - zero
                residual = w - steps * new_scale[r].repeat_interleave(width)
                target = steps[j] + (hessian[j] @ residual) / hessian[j, j] / new_scale[r, g]
                new_values[r, j] = (torch.round(target) + zero[j]).clamp(low, high)
    return new_values.to(torch.int8), new_scale


def losses(weight, values, grid, hessian):
    """tr(D H D^T) by row, float64."""
    difference = (weight - dequantize(values, grid)).double()
    return ((difference @ hessian.double()) * difference).sum(1)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_one_round_is_that_of_a_literal_loop(scheme):
    weight, x = case(out=6, seed=2)
    hessian = statistics_of(x).mean
    grid = search_grid(weight, scheme, None, torch.float32)
    start = quantize(weight, grid)
    values, refined = descend(weight, start, grid, hessian, 1)
    expected, scale = literal_descent(weight, start, grid, hessian.double())
    assert (values == expected).float().mean() > 0.99  # ties aside
    torch.testing.assert_close(refined.scale.double().expand_as(scale), scale, rtol=1e-3, atol=0)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_no_row_ever_gets_worse(scheme, scale_dtype):
    weight, x = case(seed=3)
    weight[4] = 0.0
    weight[5] *= 1e-5
    hessian = statistics_of(x).mean
    grid = search_grid(weight, scheme, None, scale_dtype)
    values = quantize(weight, grid)
    first = before = losses(weight, values, grid, hessian)
    for _ in range(3):
        values, grid = descend(weight, values, grid, hessian, 1)
        after = losses(weight, values, grid, hessian)
        assert grid.scale.dtype == scale_dtype
        assert (after <= before * 1.0001 + 1e-9).all()
        before = after
    assert after.sum() < 0.9 * first.sum()
