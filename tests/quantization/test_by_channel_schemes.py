"""RTN and GPTQ under W8A8 and FP8A16: against float64, and on degenerate statistics."""

from __future__ import annotations

import pytest
import torch
from quantization_cases import case, statistics_of

from hf_shrink.errors import CalibrationError
from hf_shrink.ops.grid import FLOAT8, dequantize, quantize
from hf_shrink.ops.linalg import damped_inverse_factor
from hf_shrink.plan import Scheme
from hf_shrink.quantization import METHODS
from hf_shrink.quantization.gptq import round_columns

FP8 = Scheme(8, True, "channel", None, "float")
W8A8 = Scheme(8, True, "channel", None, "int", 8)
both = pytest.mark.parametrize("scheme", [FP8, W8A8], ids=["fp8", "w8a8"])


def solve(method, weight, scheme, x, dtype=torch.bfloat16):
    return METHODS.build(*method).solve(weight, scheme, statistics_of(x), scale_dtype=dtype)


def loss(weight, result, x):
    return float((x.double() @ (weight - result.dequantized()).double().T).square().sum())


def test_gptq_rounds_columns_as_a_float64_reference_does():
    weight, x = case()
    grid = METHODS.build("rtn", {}).solve(weight, FP8, None, scale_dtype=torch.float32).grid
    hessian = statistics_of(x).mean
    order = hessian.diagonal().argsort(descending=True)
    upper = damped_inverse_factor(hessian[order][:, order], 0.01).upper
    found, _ = round_columns(weight, grid, order, upper.float(), 16)

    remaining, scale, u = weight.double()[:, order], grid.scale.double().flatten(), upper.double()
    expected = torch.empty_like(remaining)
    for j in range(remaining.shape[1]):
        steps = (remaining[:, j] / scale).clamp(-448, 448)
        expected[:, j] = steps.to(FLOAT8).double()
        error = (remaining[:, j] - expected[:, j] * scale) / u[j, j]
        remaining[:, j:] -= error[:, None] * u[j, j:]
    same = found.double()[:, order] == expected
    assert same.double().mean() > 0.99  # a tie in float32 may go the other way
    error = ((dequantize(found, grid).double()[:, order] - expected * scale[:, None]) ** 2).sum()
    assert error < 1e-4 * (weight.double() ** 2).sum()


@both
def test_gptq_beats_rtn_and_descent_makes_nothing_worse(scheme):
    weight, x = case()
    rounded = loss(weight, solve(("rtn", {}), weight, scheme, x), x)
    swept = loss(weight, solve(("gptq", {"refinements": 0}), weight, scheme, x), x)
    losses = [loss(weight, solve(("gptq", {"refinements": n}), weight, scheme, x), x) for n in (1, 3)]
    assert swept < rounded
    assert losses[1] <= losses[0] * (1 + 1e-3) and losses[0] <= swept * (1 + 1e-3)


@both
def test_same_bytes_every_time_and_stored_scales_are_the_ones_used(scheme):
    weight, x = case()
    for method in (("rtn", {}), ("gptq", {})):
        one, other = solve(method, weight, scheme, x), solve(method, weight, scheme, x)
        assert one.values.dtype == (FLOAT8 if scheme is FP8 else torch.int8)
        assert torch.equal(one.values.view(torch.uint8), other.values.view(torch.uint8))
        assert one.grid.scale.dtype == torch.bfloat16 and torch.equal(one.grid.scale, other.grid.scale)
        assert one.grid.scale.shape == (len(weight), 1)
        assert torch.equal(one.rows(3, 9).dequantized(), one.dequantized()[3:9])


def test_w8a8_has_the_weights_of_w8_by_channel():
    weight, x = case()
    plain = solve(("gptq", {}), weight, Scheme(8, True, "channel", None), x)
    assert torch.equal(solve(("gptq", {}), weight, W8A8, x).values, plain.values)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_degenerate_inputs(scheme, dtype):
    weight, x = case()
    x[:, 5] = 0  # a dead channel
    weight[2], weight[4] = 0, 0.5
    weight = weight.to(dtype).float()
    for tokens in (x, x[:1], x[:7]):  # rank-deficient
        result = solve(("gptq", {}), weight, scheme, tokens, dtype)
        found = result.dequantized()
        assert torch.isfinite(found).all() and (found[2] == 0).all()
        assert (found - weight).norm() / weight.norm() < 0.1
    swept = solve(("gptq", {"refinements": 0}), weight, scheme, x, dtype)
    assert torch.equal(swept.values[:, 5].float(), quantize(weight, swept.grid)[:, 5].float())


def test_bad_numbers_are_errors():
    weight, _ = case()
    weight[0, 0] = torch.nan
    with pytest.raises(CalibrationError, match="NaN"):
        METHODS.build("rtn", {}).solve(weight, FP8, None, scale_dtype=torch.float32)
