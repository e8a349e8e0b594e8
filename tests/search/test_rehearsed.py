"""What whole runs say of predictions, on made-up problems."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from hf_shrink.errors import RecipeError
from hf_shrink.plan import BlockPlan, Plan, Scheme
from hf_shrink.recipe import Budget, SearchSpec
from hf_shrink.search.choose import Chosen, choose_assignment
from hf_shrink.search.limits import Limits
from hf_shrink.search.options import Assignment, Change, Cost, Group, Option, Problem
from hf_shrink.search.pruned import undominated
from hf_shrink.search.rehearsed import CUT, MOST, USUAL, CorrectedMeasure, Factors, Rehearsed, causes, learn
from hf_shrink.search.solve import Programme

W3, NARROW = Scheme(3), BlockPlan(channels=(0, 1))


def problem() -> Problem:
    """Two blocks and an embedding. Options: dense, rounded (0.2 nats), rounded and cut (0.16 and 0.14)."""
    options = (
        Option("dense", Cost(100), 0.0),
        Option("W3", Cost(30), 0.2, Change({"up": W3}), rounding={"mlp in": 0.2}),
        Option("W3 narrow", Cost(20), 0.3, Change({"up": W3}, NARROW), rounding={"mlp in": 0.16}),
    )
    outer = (Option("dense", Cost(100), 0.0), Option("W3", Cost(30), 0.1, Change({"embed": W3})))
    blocks = [Group(f"blocks.{n} mlp", options, "decoder", n) for n in range(2)]
    return Problem((*blocks, Group("embed", outer)), Cost(), (), (), Plan("made-up"), {"decoder": 2})


def carried_out(assignment: Assignment, rounded: float, cut: float, outer: float) -> Rehearsed:
    """As if everything were exactly as predicted alone, and a run left these parts of it."""
    inside = list(problem().taken((*assignment[:2], 0)))[:2]
    alone = sum(option.damage for option in inside)
    left = sum(rounded * d for option in inside for d in option.rounding.values())
    left += cut * sum(causes(option)[CUT] for option in inside)
    ends = problem().damage((0, 0, assignment[2]))
    return Rehearsed(assignment, left, left + outer * ends, alone, alone + ends)


def test_runs_that_are_as_the_factors_say_give_the_factors() -> None:
    found = learn(problem(), [carried_out(a, 0.6, 0.9, 1.3) for a in ((1, 1, 1), (1, 2, 1))])
    assert (found.cause("mlp in"), found.cut, found.outer) == pytest.approx((0.6, 0.9, 1.3), abs=0.03)


def test_a_single_run_moves_all_factors_alike_and_explains_itself() -> None:
    usual = Factors(cut=1.2, rounded=0.5, kinds={"mlp in": 0.4, "mlp out": 0.8})
    found = learn(problem(), [carried_out((2, 2, 1), 0.2, 0.6, 1.0)], usual)
    assert (found.cause("mlp in"), found.cut) == pytest.approx((0.2, 0.6), abs=1e-6)
    assert (found.cause("mlp out"), found.cause("others")) == pytest.approx((0.4, 0.25))
    other = learn(problem(), [carried_out((1, 1, 1), 0.5, 9.9, 1.0)])
    assert (other.cause("mlp in"), other.cut) == pytest.approx((0.5, 0.5))


def test_what_nobody_tried_stays_as_predicted() -> None:
    assert learn(problem(), [carried_out((1, 1, 0), 0.5, 1.0, 1.0)]).outer == 1.0
    assert learn(problem(), []) == Factors()
    assert learn(problem(), [], USUAL) == USUAL


def test_a_run_that_went_wrong_does_not_settle_everything() -> None:
    found = learn(problem(), [Rehearsed((1, 1, 1), 400.0, 400.1, 0.4, 0.5)])
    assert found.cause("mlp in") == found.cut == MOST


def test_corrections_reach_every_option_and_every_measurement() -> None:
    plain, factors = problem(), Factors(outer=2.0, cut=0.25, rounded=9.0, kinds={"mlp in": 0.5})
    corrected = factors.applied(plain)
    assert corrected.damage((1, 2, 1)) == pytest.approx(0.5 * 0.2 + (0.5 * 0.16 + 0.25 * 0.14) + 2.0 * 0.1)
    assert corrected.cost((1, 2, 1)) == plain.cost((1, 2, 1))

    class Measured:
        def divergences(self, base: object, trials: object, tokens: object) -> list[float]:
            return [0.6, 0.0]

    found = CorrectedMeasure(Measured(), plain, corrected).divergences((0, 0, 0), [(1, 2, 1), (0, 0, 0)], None)
    assert found == pytest.approx([0.6 * 0.415 / 0.6, 0.0])


def test_an_option_that_only_pays_by_what_runs_leave_is_kept() -> None:
    """More bits for what is said to need them least."""
    one = Option("first", Cost(50), 0.2, Change({"q": W3}, NARROW), rounding={"attention in": 0.15, "mlp in": 0.05})
    other = Option("second", Cost(50), 0.3, Change({"q": W3}, NARROW), rounding={"attention in": 0.28, "mlp in": 0.02})
    worse = Option("third", Cost(51), 0.31, Change({"q": W3}, NARROW), rounding={"attention in": 0.28, "mlp in": 0.03})
    group = Group("blocks.0", (Option("dense", Cost(100), 0.0), one, other, worse), "decoder", 0)
    factors = Factors(kinds={"attention in": 0.1})
    found = undominated(group, Factors().of, factors.of)
    assert [option.name for option in found.options] == ["dense", "first", "second"]


class Same:
    """Every assignment is measured alike."""

    def divergences(self, base: Assignment, trials: Sequence[Assignment], tokens: int | None) -> list[float]:
        return [0.6] * len(trials)


def search(factors: Factors, generations: int, most: int = 110, **carried_out: Any) -> Chosen:
    plain = problem()
    programme = Programme(plain, Limits.of(Budget.from_dict({"bytes": most}), plain.dense, None))
    return choose_assignment(programme, Same, SearchSpec(generations=generations), factors=factors, **carried_out)


def test_the_best_of_what_was_carried_out_is_taken() -> None:
    tried = [Rehearsed((2, 2, 1), 0.1, 0.2, 0.3, 0.4)]
    chosen = search(Factors(), 1, tried=tried, rehearse=lambda a: Rehearsed(a, 0.4, 0.5, 0.4, 0.6))
    assert chosen.assignment == (2, 2, 1)
    assert (chosen.rehearsed, chosen.measured) == ((0.2, 0.5), 0.4)
    found = search(Factors(), 1, tried=tried, rehearse=lambda a: Rehearsed(a, 0.1, 0.1, 0.4, 0.6))
    assert found.assignment != (2, 2, 1)
    assert found.rehearsed == (0.1, 0.2)


def test_factors_decide_also_where_nothing_is_measured() -> None:
    """110 bytes: all in 3 bits, or both blocks narrow and the embedding in 3 bits."""
    assert search(Factors(), 0).assignment == (1, 1, 1)
    assert search(Factors(rounded=4.0, cut=0.1), 0).assignment == (2, 2, 1)


def test_what_is_measured_is_said_as_measured_and_what_is_compared_as_corrected() -> None:
    chosen = search(Factors(0.5, 0.5, 0.5), 1)
    assert chosen.measured == pytest.approx(0.6)
    assert chosen.history[-1] == pytest.approx(0.3)


@pytest.mark.parametrize("generations", [0, 1])
def test_a_solver_that_finds_nothing_is_said_so(generations: int) -> None:
    with pytest.raises(RecipeError, match="the solver found nothing"):
        search(Factors(), generations, most=1)
