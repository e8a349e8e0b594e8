"""Assignments near another one that keep the budget: some decisions are taken again, with predictions shaken."""

from __future__ import annotations

import numpy as np

from hf_shrink.search.options import Assignment
from hf_shrink.search.solve import Programme, Vector

FEW = (2, 3, 4, 6)  # decisions that a small swap takes again
EVERYTHING = 0.15  # share of swaps that take all of them again
SHAKEN = 0.5  # standard deviation of the logarithm of what predictions are multiplied with
GAP = 5e-3  # a swap need not be the best one
ATTEMPTS = 5  # to draw an assignment that is new


class Swaps:
    """Draws offspring of assignments.

    A swap frees some decisions, one of which has to change, and takes them again as the integer programme says when
    every predicted damage is multiplied with a random factor. So what one part gives away another gets, links and
    switches hold, and the budget is kept. Factors have a part that all options of a decision share, because what is
    mostly wrong in a prediction is how much the model minds an error there.
    """

    def __init__(self, programme: Programme, seed: int) -> None:
        self._programme = programme
        self._chance = np.random.default_rng(seed)
        self._units = _linked(programme)

    def offspring(self, parent: Assignment, known: set[Assignment], count: int) -> list[Assignment]:
        """Up to `count` new assignments within the limits, which join `known`."""
        children: list[Assignment] = []
        for _ in range(ATTEMPTS * count):
            if len(children) == count:
                break
            child = self._swap(parent)
            if child is not None and child not in known:
                known.add(child)
                children.append(child)
        return children

    def _swap(self, parent: Assignment) -> Assignment | None:
        chance, units = self._chance, self._units
        everything = chance.random() < EVERYTHING
        count = len(units) if everything else min(len(units), int(chance.choice(FEW)))
        picked = [units[place] for place in chance.choice(len(units), size=count, replace=False)]
        free = {group for unit in picked for group in unit}
        fixed = {group: [taken] for group, taken in enumerate(parent) if group not in free}
        changed = int(chance.choice(picked[0]))
        options = len(self._programme.problem.groups[changed].options)
        fixed[changed] = [option for option in range(options) if option != parent[changed]]
        if not fixed[changed]:
            return None
        return self._programme.minimise(self.shaken(), fixed, gap=GAP)

    def shaken(self) -> Vector:
        """Predicted damages times random factors."""
        programme, chance = self._programme, self._chance
        factors = np.empty_like(programme.damages)
        for start, stop in programme.spans:
            shared = chance.normal()
            factors[start:stop] = np.exp(SHAKEN * (shared + chance.normal(size=stop - start)) / np.sqrt(2))
        factors[programme.spans[-1][1] :] = 1.0
        return programme.damages * factors


def _linked(programme: Programme) -> list[tuple[int, ...]]:
    """Groups that share a link, together: freed one by one they could not drop a block."""
    owner = list(range(len(programme.problem.groups)))
    for link in programme.problem.links:
        members = {owner[group] for group, _ in link}
        owner = [min(members) if first in members else first for first in owner]
    return [tuple(g for g, first in enumerate(owner) if first == unit) for unit in sorted(set(owner))]
