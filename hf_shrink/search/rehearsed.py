"""What whole runs of a few assignments say of all: how much of what weights cost one by one is left after a run.

A run rounds each matrix on what the compressed ones before it put out and leads it back to the dense model's outputs.
So errors inside blocks cost less than those of weights that are compressed one by one, and those of embeddings and
output heads do not. How much is left depends on who comes after: what queries, keys and values do wrong is made good by
the output projection, while its own errors meet only later blocks.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from hf_shrink.search.options import Assignment, Group, Option, Problem
from hf_shrink.search.refine import Measure

MOST = 10.0  # a factor lies between its inverse and this
RIDGE = 1e-3  # of a factor's distance from what it was taken for, beside errors of the shares that runs leave
TELLING = 0.05  # share of a divergence from which on it says something about its cause
CUT = "cut"


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
        cut: of units, parts and blocks that go.
        rounded: of pieces of blocks that are rounded.
        kinds: the same of pieces of some kinds, such as "mlp in".
    """

    outer: float = 1.0
    cut: float = 1.0
    rounded: float = 1.0
    kinds: Mapping[str, float] = field(default_factory=dict)

    def of(self, group: Group, option: Option) -> float:
        """What is left of an option's damage, nats a prediction."""
        if group.block is None:
            return self.outer * option.damage
        return sum(self.cause(name) * damage for name, damage in causes(option).items())

    def cause(self, name: str) -> float:
        return self.cut if name == CUT else self.kinds.get(name, self.rounded)

    def applied(self, problem: Problem) -> Problem:
        """The problem with other damages; assignments mean the same."""
        groups = tuple(
            replace(group, options=tuple(replace(option, damage=self.of(group, option)) for option in group.options))
            for group in problem.groups
        )
        return replace(problem, groups=groups)


NEUTRAL = Factors()
# Of methods that follow the dense model, where nothing was rehearsed: from runs of SmolLM2-135M, see DESIGN.
USUAL = Factors(
    outer=1.0,
    cut=1.0,
    rounded=0.6,
    kinds={"attention in": 0.2, "attention out": 1.3, "mlp in": 0.54, "mlp out": 0.67},
)


def causes(option: Option) -> dict[str, float]:
    """What an option inside a block damages: by kind of piece that is rounded, and under `CUT` the rest."""
    return {**option.rounding, CUT: option.damage - sum(option.rounding.values())}


def learn(problem: Problem, rehearsals: Sequence[Rehearsed], prior: Factors = NEUTRAL) -> Factors:
    """Factors that explain whole runs; of all that do, those nearest to `prior` (ridge regression)."""
    outer = [
        (found.whole - found.blocks) / (found.alone_whole - found.alone_blocks)
        for found in rehearsals
        if found.alone_whole - found.alone_blocks > TELLING * found.alone_whole
    ]
    runs = [found for found in rehearsals if found.alone_blocks > 0]
    if runs:
        prior = _explaining([(_shares(problem, run.assignment), run.blocks / run.alone_blocks) for run in runs], prior)
    return replace(prior, outer=_bounded(statistics.fmean(outer))) if outer else prior


def _explaining(runs: Sequence[tuple[dict[str, float], float]], prior: Factors) -> Factors:
    """Of runs the shares of all causes in what is predicted, and what part of it was left.

    All factors grow or shrink together first, then each by itself.
    """
    names = sorted({name for shares, _ in runs for name in shares})
    shares = np.array([[found.get(name, 0.0) for name in names] for found, _ in runs])
    left = np.array([value for _, value in runs])
    near = np.array([prior.cause(name) for name in names])
    expected = shares @ near
    common = _bounded(float(expected @ left / (expected @ expected)))
    near *= common
    moved = near + np.linalg.solve(shares.T @ shares + RIDGE * np.eye(len(names)), shares.T @ (left - shares @ near))
    found = {name: _bounded(float(value)) for name, value in zip(names, moved, strict=True)}
    kinds = {name: _bounded(common * value) for name, value in prior.kinds.items()} | found
    cut = kinds.pop(CUT, _bounded(common * prior.cut))
    return Factors(prior.outer, cut, _bounded(common * prior.rounded), kinds)


def _bounded(factor: float) -> float:
    return min(max(factor, 1 / MOST), MOST)


def _shares(problem: Problem, assignment: Assignment) -> dict[str, float]:
    """Of what an assignment is predicted to damage inside blocks, by cause."""
    sums: dict[str, float] = {}
    for group, option in zip(problem.groups, problem.taken(assignment), strict=True):
        for name, damage in causes(option).items() if group.block is not None else ():
            sums[name] = sums.get(name, 0.0) + damage
    total = sum(sums.values())
    return {name: damage / total for name, damage in sums.items() if damage} if total > 0 else {}


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
