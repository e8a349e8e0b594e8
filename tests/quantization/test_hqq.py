"""Half-quadratic quantization."""

from __future__ import annotations

import pytest
import torch
from quantization_cases import SCHEMES, case

from hf_shrink.errors import CalibrationError, RecipeError
from hf_shrink.ops.grid import Grid, dequantize, integer_range, min_max_grid, quantize, search_grid
from hf_shrink.plan import Scheme
from hf_shrink.quantization import METHODS
from hf_shrink.quantization.hqq import shrink


def heavy(seed: int = 0) -> torch.Tensor:
    """A weight with outliers: (20, 48)."""
    weight, _ = case(seed=seed)
    return weight * torch.where(torch.rand(weight.shape) < 0.05, 5.0, 1.0)


def objective(weight, grid, norm=0.7):
    """Sum of |error|^norm for every scale, in float64."""
    error = (weight.double() - dequantize(quantize(weight, grid), grid).double()).abs() ** norm
    return error.reshape(grid.scale.numel(), -1).sum(1)


def reference(weight, start, rounds, norm=0.7, beta=10.0, growth=1.05):
    """The same alternation for one group in float64 and plain Python; returns the least objective after each round."""
    low, high = integer_range(start.scheme.bits)
    scale = float(start.scale)
    zero = 0 if start.zero_point is None else int(start.zero_point)
    w = [float(x) for x in weight]
    trace = []
    for k in range(rounds + 1):
        q = [min(max(round(x / scale), low - zero), high - zero) for x in w]
        error = [x / scale - n for x, n in zip(w, q, strict=True)]
        trace.append(sum(abs(e * scale) ** norm for e in error))
        kept = [
            (1 if e > 0 else -1) * max(abs(e) - abs(e) ** (norm - 1) / (beta * growth**k), 0) if e else 0.0
            for e in error
        ]
        target = [x - e * scale for x, e in zip(w, kept, strict=True)]
        if start.zero_point is not None:
            shift = round(sum(n - t / scale for n, t in zip(q, target, strict=True)) / len(w))
            new = min(max(zero + shift, low), high)
            q, zero = [n - (new - zero) for n in q], new
        size = sum(n * n for n in q)
        if size and sum(t * n for t, n in zip(target, q, strict=True)) * scale > 0:
            scale = sum(t * n for t, n in zip(target, q, strict=True)) / size
    return [min(trace[: k + 1]) for k in range(len(trace))]


@pytest.mark.parametrize("scheme", [Scheme(3, True, "group", 16), Scheme(2, False, "group", 16)], ids=str)
def test_follows_the_reference(scheme):
    weight = heavy()[:4].double().float()
    starts = [make(weight, scheme) for make in (mse, spread)]
    for rounds in (1, 4):
        fitted = METHODS.build("hqq", {"iterations": rounds}).fit(weight, tuple(starts))
        found = objective(weight, fitted)
        groups = weight.reshape(len(found), -1)
        for i, group in enumerate(groups):
            lines = [slice_of(start, i) for start in starts]
            expected = min(reference(group, line, rounds)[-1] for line in lines)
            assert found[i].item() == pytest.approx(expected, rel=2e-3)


def mse(weight, scheme):
    return search_grid(weight, scheme, None, torch.float32)


def spread(weight, scheme):
    return min_max_grid(weight, scheme, torch.float32)


def slice_of(grid, i):
    zero = None if grid.zero_point is None else grid.zero_point.reshape(-1)[i]
    return type(grid)(grid.scheme, grid.scale.reshape(-1)[i], zero)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_more_rounds_never_end_higher_nor_above_either_start(scheme, dtype):
    weight = heavy().to(dtype)
    before = torch.minimum(
        *(
            objective(weight, grid)
            for grid in (search_grid(weight, scheme, None, dtype), min_max_grid(weight, scheme, dtype))
        )
    )
    first = before
    for rounds in (1, 2, 5, 12):
        result = METHODS.build("hqq", {"iterations": rounds}).solve(weight, scheme, None, scale_dtype=dtype)
        assert result.grid.scale.dtype == dtype and result.values.dtype == torch.int8
        after = objective(weight, result.grid)
        assert (after <= before * (1 + 1e-5)).all()
        before = after
    if scheme.bits < 8:
        assert before.sum() < 0.999 * first.sum()


def test_zero_points_alone():
    weight, scheme = heavy(), Scheme(3, False, "channel", None)
    start = min_max_grid(weight, scheme, torch.float32)
    far = Grid(scheme, start.scale, start.zero_point + 3)  # so that a side of every row is cut off
    nearly_squares = METHODS.build("hqq", {"fit_scale": False, "norm": 1.0, "beta": 100.0}).fit(weight, (far,))
    assert torch.equal(nearly_squares.scale, start.scale)
    moved = nearly_squares.zero_point != far.zero_point
    assert moved.any()
    before, after = objective(weight, far, 1.0), objective(weight, nearly_squares, 1.0)
    assert (after[moved[:, 0]] < before[moved[:, 0]]).all() and torch.equal(after[~moved[:, 0]], before[~moved[:, 0]])


def test_shrinkage_lets_large_errors_stay_and_small_ones_not():
    error = torch.tensor([0.0, 0.05, -0.4, 3.0, -3.0])
    kept = shrink(error, 10.0, 0.7)
    assert kept[0] == 0 and kept[1] == 0 and kept[2] < 0
    assert kept[3] == pytest.approx(3 - 3**-0.3 / 10, rel=1e-6) and kept[4] == -kept[3]
    assert torch.equal(shrink(error, 10.0, 1.0), torch.nn.functional.softshrink(error, 0.1))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_degenerate_weights(scheme):
    hqq = METHODS.build("hqq", {})
    for weight in (
        torch.zeros(4, 48),
        torch.full((4, 48), 0.25),
        torch.full((4, 48), -3.0),
        torch.zeros(4, 48).index_fill_(1, torch.tensor([5]), 1.0),
    ):
        result = hqq.solve(weight, scheme, None, scale_dtype=torch.bfloat16)
        assert torch.isfinite(result.dequantized()).all()
        assert torch.allclose(result.dequantized(), weight, rtol=0.02, atol=1e-6)
    wide = hqq.solve(torch.randn(3, 10), Scheme(4, True, "group", 64), None, scale_dtype=torch.float32)
    assert wide.grid.scheme.group_size == 10


def test_same_weights_same_bytes_in_any_order_of_rows():
    hqq, weight, scheme = METHODS.build("hqq", {}), heavy(), Scheme(3, False, "group", 16)
    one, two = (hqq.solve(w, scheme, None, scale_dtype=torch.float16) for w in (weight, weight.flip(0)))
    assert torch.equal(one.values, two.values.flip(0)) and torch.equal(one.grid.scale, two.grid.scale.flip(0))


def test_options_and_bad_numbers():
    for options in ({"norm": 0}, {"norm": 1.5}, {"iterations": 0}, {"beta": 0}, {"growth": 0.5}, {"fit_scale": 1}):
        with pytest.raises(RecipeError, match=next(iter(options))):
            METHODS.build("hqq", options)
    weight = heavy()
    weight[2, 3] = float("inf")
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        METHODS.build("hqq", {}).solve(weight, SCHEMES[0], None, scale_dtype=torch.float32)
