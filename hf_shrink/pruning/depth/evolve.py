"""Evolution: from the greedy choice on, swap what is removed for what is kept as long as the predictions get nearer."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from hf_shrink.pruning.base import DEPTH, DepthProblem, Look, Removal
from hf_shrink.pruning.greedy import cheapest_first
from hf_shrink.pruning.options import check_counts
from hf_shrink.sharding import ranks

LARGEST_STEP = 3  # swaps of one offspring
PATIENCE = 100  # attempts to draw an offspring that is allowed and new


@DEPTH.register("evolve")
@dataclass(frozen=True)
class Evolve:
    """EvoPress (Sieberling et al., arXiv 2410.14649) with one parent, on KL(dense || pruned).

    An offspring swaps one removed item, rarely two or three, for kept ones of the same size, so that all sets remove
    as much. A generation's offspring are measured on few tokens, the best quarter on more, and the best of these, on
    all of them, takes the parent's place where it is better. So the result is never worse than the greedy start on
    what was measured. With `generations` alone the same seed gives the same choice; where `minutes` end the search, how
    far it came depends on the machine. With neither there are 20 generations.

    Attributes:
        generations: how many; None: as many as `minutes` allow.
        minutes: of the whole choice; no generation starts after them. None: no limit.
        offspring: of a generation.
        tokens, predictions: of the last measurement; the first runs on an eighth of the tokens, the second on half.
        candidates: of the greedy start, see kl_greedy.
        seed: of what is swapped.
    """

    generations: int | None = None
    minutes: float | None = None
    offspring: int = 16
    tokens: int = 4096
    predictions: int = 1024
    candidates: int | None = 10
    seed: int = 0
    takes_parts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_counts(self, "generations", "offspring", "tokens", "predictions", optional=("generations",))
        check_counts(self, "candidates", optional=("candidates",))
        check_counts(self, "seed", least=0)
        if self.minutes is not None and not (isinstance(self.minutes, int | float) and self.minutes >= 0):
            raise ValueError(f"minutes must be a number of at least 0, not {self.minutes!r}")

    def removals(self, problem: DepthProblem) -> Iterator[Removal]:
        ends = None if self.minutes is None else time.monotonic() + 60 * self.minutes
        greedy = cheapest_first(problem, self._look(2), self.candidates)
        best, loss = self._search(problem, sorted(removal.item for removal in greedy), ends)
        for item in best:
            yield Removal(item, loss)

    def _search(self, problem: DepthProblem, parent: list[int], ends: float | None) -> tuple[list[int], float]:
        """The best set found, and its divergence."""
        looks = [self._look(8), self._look(2), self._look(1)]
        if not parent:
            return parent, 0.0
        [loss] = problem.divergences(parent, [parent], looks[-1])
        chance = random.Random(self.seed)
        known = {tuple(parent)}
        generations = self.generations if self.generations is not None or ends is not None else 20
        generation = 0
        while generations is None or generation < generations:
            if not ranks().from_first(ends is None or time.monotonic() < ends):
                break
            children = self._offspring(problem, parent, known, chance)
            if not children:
                break  # every swap has been tried
            generation += 1
            for look, survivors in zip(looks, (max(1, self.offspring // 4), 1, 1), strict=True):
                found = problem.divergences(parent, children, look)
                order = sorted(range(len(children)), key=lambda place: (found[place], children[place]))
                children, found = [children[p] for p in order[:survivors]], [found[p] for p in order[:survivors]]
            if found[0] < loss:
                parent, loss = children[0], found[0]
        return parent, loss

    def _look(self, part: int) -> Look:
        return Look(max(1, self.tokens // part), max(1, self.predictions // part), fast=True)

    def _offspring(
        self, problem: DepthProblem, parent: Sequence[int], known: set[tuple[int, ...]], chance: random.Random
    ) -> list[list[int]]:
        """Up to `offspring` sets that are new, allowed, and of the parent's size."""
        children: list[list[int]] = []
        for _ in range(PATIENCE * self.offspring):
            if len(children) == self.offspring:
                break
            child = list(parent)
            for _ in range(min(chance.randint(1, LARGEST_STEP), chance.randint(1, LARGEST_STEP))):
                _swap(child, problem.sizes, chance)
            child.sort()
            if tuple(child) not in known and problem.allowed(child):
                known.add(tuple(child))
                children.append(child)
        return children


def _swap(child: list[int], sizes: Sequence[int], chance: random.Random) -> None:
    """Put a random item that is kept, of the same size, in the place of a removed one."""
    out = chance.randrange(len(child))
    alike = [item for item, size in enumerate(sizes) if size == sizes[child[out]] and item not in child]
    if alike:
        child[out] = chance.choice(alike)
