"""Different counts in different blocks: one ranking of all units, with a bound on what a block can lose."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_shrink.pruning.parts import Choice, Pool

MOST_OF_A_BLOCK = 0.8  # of the units of one kind, unless the ratio cannot be reached so


def uneven_choices(pools: Sequence[Pool], ways: Sequence[int], target: float) -> list[Choice]:
    """How many items of the given way leave each pool, so that about `target` parameters go at the least cost.

    An item's rank is its share in its block's score, per parameter. Items go in that order; one that would overshoot
    closes its pool, and finer ones of other pools fill up. At the end the best ranked of these goes too where that
    comes nearer to the target.
    """
    most = [len(pool.parts[0].ways[way]) - 1 for pool, way in zip(pools, ways, strict=True)]
    gentle = [min(n, int(MOST_OF_A_BLOCK * (n + 1))) for n in most]
    units = [pool.unit(way) for pool, way in zip(pools, ways, strict=True)]
    if sum(n * unit for n, unit in zip(gentle, units, strict=True)) >= target:
        most = gentle
    counts = [0] * len(pools)
    open_pools = {index for index, n in enumerate(most) if n}
    overshooting: list[int] = []
    removed = 0
    for index in _ranking(pools, ways, most):
        if not open_pools:
            break
        if index not in open_pools:
            continue
        if removed + units[index] > target:
            open_pools.discard(index)
            overshooting.append(index)
            continue
        counts[index] += 1
        removed += units[index]
    for index in overshooting:
        if target - removed > units[index] / 2:
            counts[index] += 1
            break
    return [pool.choice(way, count) for pool, way, count in zip(pools, ways, counts, strict=True)]


def _ranking(pools: Sequence[Pool], ways: Sequence[int], most: Sequence[int]) -> list[int]:
    """The pool of every item that may go, cheapest item first; a pool's own items come in their order."""
    values, owners = [torch.empty(0, dtype=torch.float64)], [torch.empty(0, dtype=torch.long)]
    for index, (pool, way, count) in enumerate(zip(pools, ways, most, strict=True)):
        costs = sum((part.ways[way].costs[:count] for part in pool.parts), torch.zeros(count, dtype=torch.float64))
        values.append(costs / pool.unit(way))
        owners.append(torch.full((count,), index))
    order = torch.cat(values).argsort(stable=True)
    ranked: list[int] = torch.cat(owners)[order].tolist()
    return ranked
