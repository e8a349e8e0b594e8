"""Evolution on made-up divergences that predictions get wrong."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from made_up_problems import everything, made_up

from hf_shrink.recipe import Budget
from hf_shrink.search.limits import Limits
from hf_shrink.search.options import Assignment, Problem
from hf_shrink.search.refine import Refinement, refine
from hf_shrink.search.solve import Programme
from hf_shrink.search.swaps import Swaps


class Wrong:
    """True divergences that are predictions times a factor a decision; few tokens see them with an error."""

    def __init__(self, problem: Problem, seed: int) -> None:
        chance = random.Random(seed)
        self.problem = problem
        self.factors = [chance.choice((0.1, 1.0, 6.0)) for _ in problem.groups]
        self.asked: list[tuple[int, int]] = []

    def true(self, assignment: Assignment) -> float:
        taken = self.problem.taken(assignment)
        return sum(factor * option.damage for factor, option in zip(self.factors, taken, strict=True))

    def divergences(self, base: Assignment, trials: Sequence[Assignment], tokens: int) -> list[float]:
        self.asked.append((tokens, len(trials)))
        noise = random.Random(tokens)
        return [self.true(trial) * (1 + (0.05 * noise.random() if tokens < 4096 else 0.0)) for trial in trials]


@pytest.mark.parametrize("portable", [True, False])
def test_it_finds_what_predictions_hid_and_keeps_the_budget(portable: bool) -> None:
    problem = made_up(2, blocks=2, portable=portable)
    limits = Limits.of(Budget.from_dict({"bytes": "40%"}), problem.dense)
    programme, measure = Programme(problem, limits), Wrong(problem, 3)
    start = programme.minimise()
    assert start is not None
    best = min(measure.true(a) for a in everything(problem) if limits.hold(problem.cost(a)))
    assert measure.true(start) > 1.5 * best
    how = Refinement(generations=4, offspring=8)
    found = refine([start], Swaps(programme, 0), measure, how)
    assert problem.allowed(found.assignment)
    assert limits.hold(problem.cost(found.assignment))
    assert found.divergence == pytest.approx(measure.true(found.assignment))
    assert found.divergence == pytest.approx(best)
    assert list(found.history) == sorted(found.history, reverse=True)
    # the start on all tokens; then a generation: eight on few tokens, two on half, one on all
    assert measure.asked[:4] == [(4096, 1), (512, 8), (2048, 2), (4096, 1)]
    assert refine([start], Swaps(programme, 0), Wrong(problem, 3), how) == found


def test_the_best_start_is_taken_and_no_time_means_no_swaps() -> None:
    problem = made_up(3, blocks=2)
    programme = Programme(problem, Limits.of(Budget.from_dict({"bytes": "50%"}), problem.dense))
    starts = Swaps(programme, 4).offspring((0,) * len(problem.groups), set(), 5)
    assert len(starts) == 5
    measure = Wrong(problem, 2)
    notes: list[str] = []
    found = refine(
        starts,
        Swaps(programme, 0),
        measure,
        Refinement(generations=None, minutes=0.0),
        lambda *said: notes.append(said[3]),
    )
    assert found.divergence == min(map(measure.true, starts))
    assert found.seen == 5
    assert notes[-1] == f"best KL {found.divergence:.4g}"


def test_swaps_are_new_and_leave_most_decisions_alone() -> None:
    problem = made_up(6, blocks=4)
    limits = Limits.of(Budget.from_dict({"bytes": "40%", "latency": "80%"}), problem.dense)
    programme = Programme(problem, limits)
    parent = programme.minimise()
    assert parent is not None
    known = {parent}
    children = Swaps(programme, 1).offspring(parent, known, 30)
    assert len(set(children)) == len(children) == 30
    assert known == {parent, *children}
    assert all(problem.allowed(child) and limits.hold(problem.cost(child)) for child in children)
    changed = [sum(a != b for a, b in zip(parent, child, strict=True)) for child in children]
    assert min(changed) >= 1
    assert sorted(changed)[len(changed) // 2] < len(problem.groups)
