"""Counts that cost least: pools lose units where the next parameters are the cheapest, up to a bound for each."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from hf_shrink.pruning.parts import Choice, Pool

MOST_OF_A_PART = 0.8  # of the units of one kind in a block, unless the ratio cannot be reached so


@dataclass(frozen=True)
class _Step:
    """From one choice of a pool to its next."""

    pool: int
    choice: Choice
    parameters: int
    slope: float  # what each of them costs


def cheapest_choices(pools: Sequence[Pool], target: float) -> list[Choice]:
    """How many items leave each pool, and in which way, so that about `target` parameters go at the least cost.

    A pool's choices are those on the lower convex hull of cost over parameters, so that its steps become dearer and
    steps of all pools can be taken in the order of what a parameter costs. A step that would overshoot is taken in part
    where it is one of single items, and closes its pool; finer ones of other pools fill up. At the end the best step
    that overshot is taken after all where that comes nearer to the target.
    """
    bounds = [MOST_OF_A_PART * pool.size for pool in pools]
    if sum(_most(pool, bound) for pool, bound in zip(pools, bounds, strict=True)) < target:
        bounds = [float("inf")] * len(pools)
    found = [pool.choice(0, 0) for pool in pools]
    steps = [s for n, (pool, bound) in enumerate(zip(pools, bounds, strict=True)) for s in _steps(n, pool, bound)]
    closed: set[int] = set()
    overshooting: list[_Step] = []
    room = target
    for step in sorted(steps, key=lambda s: (s.slope, s.pool, s.parameters)):
        if step.pool in closed:
            continue
        if step.parameters <= room:
            found[step.pool] = step.choice
            room -= step.parameters
            continue
        closed.add(step.pool)
        overshooting.append(step)
        part = _in_part(pools[step.pool], found[step.pool], step.choice, room)
        room -= part.removed - found[step.pool].removed
        found[step.pool] = part
    for step in overshooting:
        more = step.choice
        if found[step.pool].way == more.way or not found[step.pool].count:
            counts = pools[step.pool].counts(more.way)
            place = bisect.bisect_right(counts, found[step.pool].count)
            more = pools[step.pool].choice(more.way, counts[min(place, len(counts) - 1)])
        extra = more.removed - found[step.pool].removed
        if extra > 0 and abs(room - extra) < room:
            found[step.pool] = more
            break
    return found


def _most(pool: Pool, bound: float) -> int:
    return max(
        pool.unit(way) * count for way in pool.ways for count in pool.counts(way) if _fits(pool, way, count, bound)
    )


def _fits(pool: Pool, way: int, count: int, bound: float) -> bool:
    return count == 0 or pool.unit(way) * count <= bound + 0.5


def _steps(index: int, pool: Pool, bound: float) -> list[_Step]:
    """From nothing up the lower convex hull of what the pool's choices cost."""
    points = sorted(
        (pool.unit(way) * count, pool.cost(way, count), way, count)
        for way in pool.ways
        for count in pool.counts(way)
        if count and _fits(pool, way, count, bound)
    )
    hull: list[tuple[int, float, int, int]] = [(0, 0.0, 0, 0)]
    for point in points:
        if point[0] == hull[-1][0]:  # as many parameters in a dearer way
            continue
        while len(hull) > 1 and _slope(hull[-2], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return [
        _Step(index, pool.choice(after[2], after[3]), after[0] - before[0], _slope(before, after))
        for before, after in itertools.pairwise(hull)
    ]


def _slope(before: tuple[int, float, int, int], after: tuple[int, float, int, int]) -> float:
    return (after[1] - before[1]) / (after[0] - before[0])


def _in_part(pool: Pool, now: Choice, wanted: Choice, room: float) -> Choice:
    """As far from `now` towards `wanted` as there is room for, where both are the same way."""
    if now.count and now.way != wanted.way:
        return now
    fitting = [
        count
        for count in pool.counts(wanted.way)
        if now.count < count < wanted.count and pool.unit(wanted.way) * count - now.removed <= room
    ]
    return pool.choice(wanted.way, fitting[-1]) if fitting else now
