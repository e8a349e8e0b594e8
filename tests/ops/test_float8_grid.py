"""float8 grids: against a table of all values in float64, against compressed-tensors, on degenerate weights."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import dequantize as stock_dequantize
from compressed_tensors.quantization.lifecycle.forward import quantize as stock_quantize
from compressed_tensors.quantization.utils import calculate_qparams

from hf_shrink.checkpoint.packed import arguments_of
from hf_shrink.ops.columns import GridColumns
from hf_shrink.ops.grid import FLOAT8, FLOAT8_RATIOS, dequantize, min_max_grid, nearest_, quantize, search_grid
from hf_shrink.plan import Scheme

FP8 = Scheme(8, True, "channel", None, "float")
TABLE = torch.arange(256, dtype=torch.uint8).view(FLOAT8).double()
TABLE = TABLE[~TABLE.isnan()].unique()


def weight_of(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(10, 48, generator=generator) * torch.logspace(-2, 1, 10)[:, None]
    weight[3, 5] = 40.0
    return weight


def nearest_in_table(values: torch.Tensor) -> torch.Tensor:
    """The distance to the nearest value of the table, in float64."""
    return (values.double()[..., None] - TABLE).abs().amin(-1)


def test_rounds_to_the_nearest_value_and_saturates():
    values = torch.cat([torch.linspace(-600, 600, 4001), torch.randn(2000), torch.randn(500) * 1e-3])
    rounded = nearest_(values.clone(), FP8)
    assert torch.isin(rounded.double(), TABLE).all()
    assert torch.equal((values.double() - rounded.double()).abs(), nearest_in_table(values))
    extreme = nearest_(torch.tensor([1e30, -1e30, 449.0, 470.0, -464.1]), FP8)
    assert extreme.tolist() == [448.0, -448.0, 448.0, 448.0, -448.0]


def test_min_max_and_rounding_are_those_of_compressed_tensors():
    weight, arguments = weight_of(), arguments_of(FP8)
    grid = min_max_grid(weight, FP8, torch.float32)
    scale, _ = calculate_qparams(weight.amin(1), weight.amax(1), arguments)
    torch.testing.assert_close(grid.scale.flatten(), scale, rtol=1e-6, atol=0)
    values = quantize(weight, grid)
    assert values.dtype == FLOAT8
    stock = stock_quantize(weight, grid.scale, None, arguments, dtype=FLOAT8)
    assert torch.equal(values.float(), stock.float())
    assert torch.equal(dequantize(values, grid), stock_dequantize(stock, grid.scale, None, arguments))


def test_search_finds_the_least_loss_of_a_brute_force_search():
    weight = weight_of(1)
    importance = torch.rand(48, generator=torch.Generator().manual_seed(2)) ** 4
    grid = search_grid(weight, FP8, importance, torch.float32)

    def losses(scale: torch.Tensor) -> torch.Tensor:
        steps = weight.double() / scale.double()
        return ((nearest_in_table(steps) * scale.double()) ** 2 * importance.double()).sum(1)

    top = weight.abs().amax(1, keepdim=True) / 448
    best = torch.stack([losses(top * ratio) for ratio in FLOAT8_RATIOS]).amin(0)
    torch.testing.assert_close(losses(grid.scale), best, rtol=1e-3, atol=0)
    assert (losses(grid.scale) <= losses(min_max_grid(weight, FP8, torch.float32).scale) * (1 + 1e-6)).all()
    assert losses(grid.scale).sum() < losses(top).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_degenerate_rows(dtype):
    weight = torch.zeros(4, 32)
    weight[1] = 0.25
    weight[2, 3] = 1e-30
    weight[3] = torch.randn(32) * 1e-4
    weight = weight.to(dtype)
    for grid in (min_max_grid(weight, FP8, dtype), search_grid(weight, FP8, None, dtype)):
        assert grid.scale.dtype == dtype and torch.isfinite(grid.scale).all()
        found = dequantize(quantize(weight, grid), grid)
        assert torch.isfinite(found).all() and (found[0] == 0).all()
        torch.testing.assert_close(found[1], weight[1].float(), rtol=0.07, atol=0)
        assert found[2].abs().max() <= 1e-6
        torch.testing.assert_close(found[3], weight[3].float(), rtol=0.07, atol=2e-6)


def test_columns_hold_what_the_grid_holds():
    weight = weight_of(3)
    grid = search_grid(weight, FP8, None, torch.bfloat16)
    values = quantize(weight, grid)
    columns = GridColumns(grid, len(weight), torch.randperm(48))
    back = columns.values(columns.steps(values))
    assert back.dtype == FLOAT8 and torch.equal(back.view(torch.uint8), values.view(torch.uint8))
