"""What whole runs of a few assignments say of all: how much of what weights cost one by one is left after a run.

A run rounds each matrix on what the compressed ones before it put out and leads it back to the dense model's outputs.
So errors inside blocks cost less than those of weights that are compressed one by one, those of embeddings and output
heads do not, and what is cut gains another share than what is rounded.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hf_shrink.search.levers import levers_of
from hf_shrink.search.options import Assignment, Group, Option, Problem
from hf_shrink.search.refine import Measure

MOST = 4.0  # a factor lies between its inverse and this
TELLING = 0.05  # share of a divergence from which on it says something about its cause


@dataclass(frozen=True)
class Rehearsed:
    """An assignment that was carried out on a copy of the model. Divergences in nats a prediction, on held-out data.

    Attributes:
        blocks: of the run, embeddings and output heads left dense.
        whole: of the run, with everything.
        alone_blocks, alone_whole: the same of weights that are compressed one by one.
    """

    assignment: Assignment
    blocks: float
    whole: float
    alone_blocks: float
    alone_whole: float


@dataclass(frozen=True)
class Factors:
    """What a run leaves of predicted damages.

    Attributes:
        outer: of embeddings and output heads.
        rounded: of parts of blocks that are only rounded.
        cut: of parts of blocks that lose units, or go.
    """

    outer: float = 1.0
    rounded: float = 1.0
    cut: float = 1.0

    def of(self, group: Group, option: Option) -> float:
        if group.block is None:
            return self.outer
        return self.cut if levers_of(option) & {"width", "depth"} else self.rounded

    def applied(self, problem: Problem) -> Problem:
        """The problem with other damages; assignments mean the same."""
        groups = tuple(
            replace(group, options=tuple(replace(o, damage=o.damage * self.of(group, o)) for o in group.options))
            for group in problem.groups
        )
        return replace(problem, groups=groups)


NEUTRAL = Factors()
# Of methods that follow the dense model, where nothing was rehearsed: from two rehearsals of SmolLM2-135M, see DESIGN.
USUAL = Factors(outer=1.0, rounded=0.77, cut=0.87)


def learn(problem: Problem, rehearsals: Sequence[Rehearsed]) -> Factors:
    """Factors from whole runs; 1 where none says anything."""
    outer = [
        (found.whole - found.blocks) / (found.alone_whole - found.alone_blocks)
        for found in rehearsals
        if found.alone_whole - found.alone_blocks > TELLING * found.alone_whole
    ]
    inside = [(f.blocks / f.alone_blocks, *_shares(problem, f.assignment)) for f in rehearsals if f.alone_blocks > 0]
    rounded = _mean([left for left, _, cut in inside if cut < TELLING])
    # Of a run with both, what its rounded parts leave is known; where it is not, both leave the same.
    cut = _mean([left if rounded is None else (left - rounded * r) / c for left, r, c in inside if c >= TELLING])
    either = next((found for found in (rounded, cut) if found is not None), 1.0)
    return Factors(_mean(outer) or 1.0, rounded or either, cut or either)


def _mean(found: Sequence[float]) -> float | None:
    """The mean between the bounds; None of nothing."""
    return min(max(statistics.fmean(found), 1 / MOST), MOST) if found else None


def _shares(problem: Problem, assignment: Assignment) -> tuple[float, float]:
    """Of what an assignment is predicted to damage inside blocks, the shares of what is only rounded and of cuts."""
    sums = {False: 0.0, True: 0.0}
    for group, option in zip(problem.groups, problem.taken(assignment), strict=True):
        if group.block is not None:
            sums[bool(levers_of(option) & {"width", "depth"})] += option.damage
    total = sum(sums.values())
    return (sums[False] / total, sums[True] / total) if total > 0 else (1.0, 0.0)


class CorrectedMeasure:
    """True divergences of weights compressed one by one, times what a run is predicted to leave of them."""

    def __init__(self, measure: Measure, problem: Problem, corrected: Problem) -> None:
        self._measure, self._problem, self._corrected = measure, problem, corrected

    def divergences(self, base: Assignment, trials: Sequence[Assignment], tokens: int | None) -> list[float]:
        """See `refine.Measure`."""
        found = self._measure.divergences(base, trials, tokens)
        return [value * self.left(trial) for value, trial in zip(found, trials, strict=True)]

    def left(self, assignment: Assignment) -> float:
        """Which part of what it damages one by one a run is predicted to leave."""
        before = self._problem.damage(assignment)
        return self._corrected.damage(assignment) / before if before > 0 else 1.0
