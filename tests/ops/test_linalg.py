"""Damped inverse factors and the least-squares refit, against float64 solves on the data itself."""

from __future__ import annotations

import pytest
import torch

from hf_shrink.errors import CalibrationError
from hf_shrink.ops.linalg import (
    damped,
    damped_cholesky,
    damped_inverse_factor,
    dead_channels,
    invert_lower_,
    least_squares_refit,
    relative_error,
    solve_factored,
)


def inputs(tokens: int = 200, channels: int = 24, seed: int = 0) -> torch.Tensor:
    """Correlated inputs, (tokens, channels)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=generator) + 2 * torch.eye(channels)
    return torch.randn(tokens, channels, generator=generator) @ mix


@pytest.mark.parametrize("channels", [24, 1100])
def test_factor_of_the_inverse(channels):
    x = inputs(2000, channels)
    moment = x.T @ x / len(x)
    factor = damped_inverse_factor(moment, 0.01)
    damped = moment.double() + 0.01 * moment.double().diagonal().mean() * torch.eye(channels).double()
    assert factor.damping == 0.01 and factor.upper.dtype == torch.float64
    assert torch.equal(factor.upper, factor.upper.triu())
    torch.testing.assert_close(factor.upper.T @ factor.upper @ damped, torch.eye(channels).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [1, 2, 257, 700])
def test_a_triangle_is_inverted_where_it_lies(size):
    x = inputs(3 * size + 8, size)
    lower, _ = damped_cholesky(x.T @ x, 0.01)
    expected, place = torch.linalg.inv(lower), lower.data_ptr()
    invert_lower_(lower)
    assert lower.data_ptr() == place and torch.equal(lower, lower.tril())
    torch.testing.assert_close(lower, expected, rtol=1e-10, atol=1e-12)


def test_the_moment_itself_is_not_factored_in_place():
    x = inputs()
    moment = (x.T @ x).double()
    before = moment.clone()
    lower, _ = damped_cholesky(moment, 0.01)
    assert torch.equal(moment, before)
    right = torch.randn(24, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    damping = 0.01 * moment.diagonal().mean() * torch.eye(24).double()
    torch.testing.assert_close(solve_factored(lower, right), torch.linalg.solve(moment + damping, right))


def test_damping_lasts_as_long_as_it_is_needed():
    x = inputs()
    moment = x.T @ x
    before = moment.clone()
    with pytest.raises(ZeroDivisionError), damped(moment, 0.1):
        expected = before + 0.1 * before.diagonal().mean() * torch.eye(24)
        torch.testing.assert_close(moment, expected)
        raise ZeroDivisionError
    assert torch.equal(moment, before)
    with damped(dead := torch.zeros(3, 3), 0.1):
        assert torch.equal(dead, torch.eye(3))


def test_dead_channels_stay_apart():
    x = inputs()
    x[:, [3, 17]] = 0
    moment = x.T @ x
    assert dead_channels(moment).nonzero().flatten().tolist() == [3, 17]
    upper = damped_inverse_factor(moment, 0.01).upper
    for dead in (3, 17):
        assert upper[dead].count_nonzero() == 1 and upper[:, dead].count_nonzero() == 1


@pytest.mark.parametrize("tokens", [1, 5])
def test_rank_deficient_moments_need_only_the_asked_damping(tokens):
    x = inputs(tokens)
    factor = damped_inverse_factor(x.T @ x, 0.01)
    assert factor.damping == 0.01 and torch.isfinite(factor.upper).all()


def test_damping_grows_until_cholesky_holds():
    moment = torch.eye(6) + 0.5
    moment[0, 0] = -1.0
    factor = damped_inverse_factor(moment, 0.01)
    assert factor.damping == pytest.approx(10.0)
    assert torch.isfinite(factor.upper).all()
    with pytest.raises(CalibrationError, match="not a second moment"):
        damped_inverse_factor(-torch.eye(6), 0.01)


def test_no_input_at_all_counts_every_channel_alike():
    assert torch.equal(damped_inverse_factor(torch.zeros(5, 5), 0.01).upper, torch.eye(5).double())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_moments_are_named(bad):
    moment = torch.eye(6)
    moment[2, 4] = bad
    with pytest.raises(CalibrationError, match="inputs hold NaN or Inf"):
        damped_inverse_factor(moment, 0.01)
    with pytest.raises(CalibrationError, match="inputs hold NaN or Inf"):
        least_squares_refit(torch.ones(3, 6), moment, torch.tensor([0, 1]), 0.01)
    with pytest.raises(CalibrationError, match="weight to refit holds NaN or Inf"):
        least_squares_refit(torch.full((3, 6), bad), torch.eye(6), torch.tensor([0, 1]), 0.01)


def test_refit_is_the_least_squares_solution_on_the_inputs():
    x, weight = inputs().double(), torch.randn(7, 24)
    kept = torch.tensor([1, 2, 5, 8, 11, 12, 20])
    refitted = least_squares_refit(weight, (x.T @ x).float(), kept, 1e-9)
    best = torch.linalg.lstsq(x[:, kept], x @ weight.double().T).solution.T
    assert refitted.shape == (7, 7) and refitted.dtype == torch.float32
    torch.testing.assert_close(refitted.double(), best, rtol=1e-3, atol=1e-4)

    def loss(w: torch.Tensor) -> float:
        return (x[:, kept] @ w.double().T - x @ weight.double().T).square().sum().item()

    assert loss(refitted) < 0.8 * loss(weight[:, kept])


def test_refit_minimises_its_damped_objective():
    x, weight, damping = inputs(), torch.randn(3, 24), 0.3
    moment, kept = (x.T @ x).double(), torch.tensor([9, 0, 4, 22])
    ridge = damping * moment[kept, kept].mean()
    refitted = least_squares_refit(weight, moment.float(), kept, damping).double().requires_grad_()
    change = torch.zeros(3, 24).double()
    change = change.index_copy(1, kept, refitted) - weight.double()
    objective = ((change @ moment) * change).sum() + ridge * (refitted - weight[:, kept]).square().sum()
    (gradient,) = torch.autograd.grad(objective, refitted)
    assert gradient.abs().max() < 1e-5 * moment.abs().max()


def test_refit_limits():
    x, weight = inputs(), torch.randn(7, 24)
    moment = x.T @ x
    order = torch.randperm(24)
    torch.testing.assert_close(least_squares_refit(weight, moment, order, 0.01), weight[:, order])
    kept = torch.arange(6)
    torch.testing.assert_close(least_squares_refit(weight, moment, kept, 900.0), weight[:, kept], rtol=0.05, atol=0.05)
    rank_deficient = x[:2].T @ x[:2]
    assert torch.isfinite(least_squares_refit(weight, rank_deficient, kept, 0.01)).all()


def test_relative_error_is_that_of_the_outputs():
    x, weight = inputs(), torch.randn(7, 24)
    other = weight + 0.1 * torch.randn(7, 24)
    outputs, changed = x.double() @ weight.double().T, x.double() @ other.double().T
    expected = ((changed - outputs).square().sum() / outputs.square().sum()).item()
    assert relative_error(weight, other, x.T @ x) == pytest.approx(expected, rel=1e-4)
    plain = ((weight - other).square().sum() / weight.square().sum()).item()
    assert relative_error(weight, other, None) == pytest.approx(plain, rel=1e-5)
    assert relative_error(torch.zeros(7, 24), torch.zeros(7, 24), x.T @ x) == 0.0


def test_the_factor_of_the_inverse_in_any_order() -> None:
    x = torch.randn(100, 12) @ torch.randn(12, 12)
    moment, order = x.T @ x / 100, torch.randperm(12)
    factor = damped_inverse_factor(moment, 0.01, order)
    damped = moment.double() + 0.01 * moment.diagonal().mean() * torch.eye(12)
    torch.testing.assert_close(factor.upper.T @ factor.upper, torch.linalg.inv(damped[order][:, order]))
