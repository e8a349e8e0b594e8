"""The order of removal and exchanges, against references that solve everything anew at every step."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hf_shrink.errors import CalibrationError
from hf_shrink.ops.exchange import exchanged
from hf_shrink.ops.linalg import damped_cholesky, least_squares_refit
from hf_shrink.ops.removal import removal_curve

DAMPING = 0.01


def problem(size: int, tokens: int = 300, rows: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the second moment of correlated inputs of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator) * torch.linspace(0.3, 2, size)
    x = torch.randn(tokens, size, generator=generator) @ mix
    return torch.randn(rows, size, generator=generator), x.T @ x / tokens


def loss(weight: Tensor, moment: Tensor, units: list[int], width: int) -> float:
    """What is lost of the output without these units and with the best update: tr(W_R (H^-1_RR)^-1 W_R^T)."""
    lower, _ = damped_cholesky(moment, DAMPING)
    columns = torch.tensor(units)[:, None] * width + torch.arange(width)
    columns = columns.reshape(-1)
    inverse = torch.linalg.inv(lower @ lower.T)[columns][:, columns]
    lost = weight.double()[:, columns]
    return float((lost @ torch.linalg.inv(inverse) * lost).sum())


def greedy(weight: Tensor, moment: Tensor, width: int, groups: int | None) -> tuple[list[int], list[float]]:
    units = weight.shape[1] // width
    removed: list[int] = []
    losses = []
    while len(removed) < units:
        row = {u: u // (units // groups) if groups else 0 for u in range(units)}
        done = [sum(row[r] == row[u] for r in removed) for u in range(units)]
        least = min(done)
        open_units = [u for u in range(units) if u not in removed and (groups is None or done[u] == least)]
        found = {u: loss(weight, moment, [*removed, u], width) for u in open_units}
        removed.append(min(found, key=lambda u: found[u]))
        losses.append(found[removed[-1]])
    return removed, losses


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_wide_units_are_solved_right_by_several_threads() -> None:
    """A KV group of three heads of 64 is 192 columns, from which on torch 2.13's batched LU is wrong."""
    weight, moment = problem(3 * 192)
    found = removal_curve(weight, moment, DAMPING, width=192)
    order, losses = greedy(weight, moment, 192, None)
    assert found.order.tolist() == order
    torch.testing.assert_close(found.losses, torch.tensor(losses, dtype=torch.float64), rtol=1e-6, atol=0)
    best = min(range(3), key=lambda u: loss(weight, moment, [u], 192))
    for start in range(3):
        better = exchanged(weight, moment, DAMPING, torch.tensor([start]), width=192)
        assert better.tolist() == [best]


@pytest.mark.parametrize(
    ("size", "width", "groups"), [(90, 1, None), (24, 4, None), (36, 3, 3), (80, 1, 4), (12, 12, None), (5, 5, 1)]
)
def test_the_order_is_that_of_solving_anew_at_every_step(size: int, width: int, groups: int | None) -> None:
    """90 columns: more than wait in a panel, so that panels are worked in and what is gone is left out."""
    weight, moment = problem(size)
    found = removal_curve(weight, moment, DAMPING, width=width, groups=groups)
    order, losses = greedy(weight, moment, width, groups)
    assert found.order.tolist() == order
    torch.testing.assert_close(found.losses, torch.tensor(losses, dtype=torch.float64), rtol=1e-6, atol=0)
    alone = [loss(weight, moment, [u], width) for u in range(size // width)]
    torch.testing.assert_close(found.alone, torch.tensor(alone, dtype=torch.float64), rtol=1e-6, atol=0)


def test_the_loss_is_that_of_the_refit() -> None:
    """What the curve says is what `least_squares_refit` leaves, damping included."""
    weight, moment = problem(40)
    found = removal_curve(weight, moment, DAMPING)
    for count in (1, 7, 25, 39):
        kept = found.order.new_tensor([u for u in range(40) if u not in found.order[:count].tolist()])
        fitted = torch.zeros(9, 40, dtype=torch.float64)
        lower, _ = damped_cholesky(moment, DAMPING)
        damped = lower @ lower.T
        fitted[:, kept] = least_squares_refit(weight, damped, kept, 0.0).double()
        gap = weight.double() - fitted
        assert float((gap @ damped * gap).sum()) == pytest.approx(float(found.losses[count - 1]), rel=1e-6)


def test_idle_and_doubled_units_go_first_and_cost_nothing() -> None:
    weight, _ = problem(12)
    x = torch.randn(200, 12)
    x[:, 4] = 0
    x[:, 9] = x[:, 2]
    found = removal_curve(weight, x.T @ x / 200, 1e-6)
    assert found.order[0] == 4 and int(found.order[1]) in (2, 9)
    assert float(found.losses[1]) < 1e-3 < 0.1 < float(found.losses[2])


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_statistics_of_too_few_tokens_still_give_an_order(tokens: int) -> None:
    weight, _ = problem(30)
    x = torch.randn(tokens, 30)
    found = removal_curve(weight, x.T @ x / max(tokens, 1), DAMPING, width=3)
    assert sorted(found.order.tolist()) == sorted(set(found.order.tolist())) and len(found.order) == 10
    assert torch.isfinite(found.losses).all() and (found.losses.diff() >= 0).all()
    removed = exchanged(weight, x.T @ x / max(tokens, 1), DAMPING, found.order[:4], width=3)
    assert len(set(removed.tolist())) == 4


def test_not_finite_statistics_are_an_error() -> None:
    moment = torch.full((4, 4), float("nan"))
    with pytest.raises(CalibrationError, match="NaN"):
        removal_curve(torch.randn(2, 4), moment, DAMPING)
    with pytest.raises(CalibrationError, match="NaN"):
        exchanged(torch.randn(2, 4), moment, DAMPING, torch.tensor([1]))


@pytest.mark.parametrize(("width", "groups"), [(1, None), (4, None), (4, 3), (1, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_exchanges_never_raise_the_loss_and_stop_where_no_pair_lowers_it(
    width: int, groups: int | None, seed: int
) -> None:
    units, rounds = 12 if width > 1 else 24, 60
    weight, moment = problem(units * width, seed=seed)
    per = units // (groups or 1)
    start = torch.cat([torch.arange(per - per // 2, per) + g * per for g in range(groups or 1)])  # the largest inputs
    found = exchanged(weight, moment, DAMPING, start, width=width, groups=groups, rounds=rounds)
    assert len(found) == len(start) and found.tolist() == sorted(set(found.tolist()))
    if groups:
        assert torch.bincount(found // per, minlength=groups).tolist() == [per // 2] * groups
    before, after = (loss(weight, moment, r.tolist(), width) for r in (start, found))
    assert after < 0.97 * before
    for a in found.tolist():
        for b in set(range(units)) - set(found.tolist()):
            if groups is None or a // per == b // per:
                swapped = sorted({*found.tolist(), b} - {a})
                assert loss(weight, moment, swapped, width) > after * (1 - 1e-5)


def test_nothing_and_everything_removed_stay_as_they_are() -> None:
    weight, moment = problem(6)
    assert exchanged(weight, moment, DAMPING, torch.tensor([], dtype=torch.long)).tolist() == []
    assert exchanged(weight, moment, DAMPING, torch.arange(6)).tolist() == list(range(6))
