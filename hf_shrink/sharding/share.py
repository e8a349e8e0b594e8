"""Pieces of work split over the processes of a run."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from hf_shrink.sharding.ranks import Ranks, alone, ranks

T = TypeVar("T")
R = TypeVar("R")
STEPS = range(2, 17)  # of regular choices that are shared out evenly, see `share`


@dataclass(frozen=True)
class Share:
    """Which of `count` pieces of work, such as batches, are this process's.

    Attributes:
        own: their numbers, ascending.
        split: False: every process has all of them, and does the same.
    """

    count: int
    own: tuple[int, ...]
    split: bool
    ranks: Ranks

    def of(self, items: Sequence[T]) -> list[T]:
        """This process's of all `count` items."""
        return [items[number] for number in self.own]

    def among(self, chosen: Sequence[int]) -> Share:
        """The same of some of the pieces, numbered anew in the order of `chosen`."""
        own = set(self.own)
        places = tuple(place for place, number in enumerate(chosen) if number in own)
        return Share(len(chosen), places, self.split, self.ranks)

    def gather(self, own: Iterable[T]) -> list[T]:
        """What all processes have for their pieces, in the order of the pieces. `own`: for this process's."""
        values = list(own)
        if not self.split:
            return self.ranks.from_first(values)
        found = {n: v for part in self.ranks.gather(dict(zip(self.own, values, strict=True))) for n, v in part.items()}
        return [found[number] for number in range(self.count)]

    def add_up(self, *tensors: Tensor) -> None:
        """From sums over this process's pieces to sums over all, in place. All processes hold the same bits then."""
        (self.ranks.add_up if self.split else self.ranks.copy_first)(*tensors)

    def highest(self, *tensors: Tensor) -> None:
        """From maxima over this process's pieces to maxima over all, in place."""
        (self.ranks.highest if self.split else self.ranks.copy_first)(*tensors)

    def totals(self, values: Sequence[float]) -> list[float]:
        """From numbers summed over this process's pieces to sums over all, each for itself."""
        if not self.split:
            return self.ranks.from_first(list(values))
        return [sum(column) for column in zip(*self.ranks.gather(list(values)), strict=True)]


def share(count: int) -> Share:
    """Who does which of `count` pieces follows from their number and the rank alone.

    Every row of as many pieces as processes has one for each, in such an order that regular choices of pieces (every
    third) are shared out nearly evenly as well. Fewer pieces than processes are done by all processes alike.
    """
    here = ranks()
    if here.size == 1 or count < here.size:
        return whole(count)
    owners = owners_of(count, here.size)
    return Share(count, tuple(n for n in range(count) if owners[n] == here.rank), True, here)


def whole(count: int) -> Share:
    """All pieces for every process."""
    return Share(count, tuple(range(count)), False, ranks())


@functools.cache
def owners_of(count: int, size: int) -> tuple[int, ...]:
    """The rank that has each of `count` pieces. Row by row the turn that evens out what the multiples of each of STEPS
    have come to so far."""
    owners: list[int] = []
    loads = {step: [0] * size for step in STEPS}
    for start in range(0, count, size):
        chosen = [(place, loads[step]) for place in range(size) for step in STEPS if (start + place) % step == 0]

        def load(turn: int, chosen: Sequence[tuple[int, list[int]]] = chosen) -> int:
            return sum(so_far[(place + turn) % size] for place, so_far in chosen)

        turn = min(range(size), key=load)
        for place, so_far in chosen:
            so_far[(place + turn) % size] += 1
        owners += [(place + turn) % size for place in range(size)]
    return tuple(owners[:count])


def spread(items: Sequence[T], work: Callable[[T], R], costs: Sequence[float] | None = None) -> list[R]:
    """`work` of every item, each done by one process, without the others; all get all results, in order.

    Args:
        work: what it gives goes from process to process: numbers, tensors, dataclasses.
        costs: of the items, by which they are shared out; None: all alike.
    """
    here = ranks()
    if here.size == 1:
        return [work(item) for item in items]
    owners = _owners([1.0] * len(items) if costs is None else costs, here.size)
    with alone():
        own = {n: work(item) for n, item in enumerate(items) if owners[n] == here.rank}
    found = {n: result for part in here.gather(own) for n, result in part.items()}
    return [found[n] for n in range(len(items))]


def stretches(count: int, multiple: int = 1) -> list[slice]:
    """`count` rows in stretches for `spread`, one for each process, that begin at multiples of `multiple`."""
    each = max(1, math.ceil(count / ranks().size / multiple)) * multiple
    return [slice(start, min(start + each, count)) for start in range(0, max(count, 1), each)]


def _owners(costs: Sequence[float], size: int) -> list[int]:
    """The rank for every item: the dearest first, each to whoever has least so far."""
    loads, owners = [0.0] * size, [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda n: (-costs[n], n)):
        owners[number] = min(range(size), key=lambda rank: (loads[rank], rank))
        loads[owners[number]] += costs[number]
    return owners
