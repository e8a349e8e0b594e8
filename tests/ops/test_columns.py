"""The column layout of weights and grids."""

from __future__ import annotations

import pytest
import torch

from hf_shrink.ops.columns import GridColumns
from hf_shrink.ops.grid import dequantize, quantize, search_grid
from hf_shrink.plan import Scheme


@pytest.mark.parametrize("rows", [1, 16, 21])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy, size", [("tensor", None), ("channel", None), ("group", 8)])
def test_layout_round_trip(rows, symmetric, strategy, size):
    weight = torch.randn(rows, 24) + 0.3
    grid = search_grid(weight, Scheme(3, symmetric, strategy, size), None, torch.bfloat16)
    order = torch.randperm(24)
    columns = GridColumns(grid, rows, order)
    values = quantize(weight, grid)
    steps = columns.steps(values)
    assert torch.equal(columns.values(steps), values)
    for j in range(24):
        dense = steps[j] * columns.scale[columns.group_of[j]]
        assert torch.equal(dense[:rows], dequantize(values, grid)[:, order[j]])
        fractional = columns.place(weight)[j] * columns.inverse[columns.group_of[j]]
        assert torch.equal(columns.round_(fractional, j)[:rows], steps[j, :rows])
