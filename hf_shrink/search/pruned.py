"""Leave out options that another beats in everything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hf_shrink.search.options import Group, Option


def undominated(group: Group, *readings: Callable[[Group, Option], float]) -> Group:
    """The group without options that cost and damage at least as much as another of the same needs.

    The first one stays, so do options that drop the block, which are linked with others, and those with the same bits
    everywhere, which plans are compared with.

    Args:
        readings: ways to read what an option of a group damages; what is best by one of them stays.
    """
    by_needs: dict[tuple[object, ...], list[int]] = {}
    for index, option in enumerate(group.options):
        by_needs.setdefault((option.needs, option.change.dropped), []).append(index)
    kept = {0, *_same_bits(group)}
    for indices in by_needs.values():
        costs = [_costs(group.options[i], group) for i in indices]
        for damage in readings:
            prices = [[damage(group, group.options[i]), *cost] for i, cost in zip(indices, costs, strict=True)]
            kept |= {indices[place] for place in _front(np.array(prices))}
    return replace(group, options=tuple(option for index, option in enumerate(group.options) if index in kept))


def _same_bits(group: Group) -> list[int]:
    """The options that round all matrices to the same bits and cut nothing."""
    most = max(len(option.change.schemes) for option in group.options)
    return [
        index
        for index, option in enumerate(group.options)
        if len(option.change.schemes) == most and option.change.block.keeps_all
        if len({scheme.bits for scheme in option.change.schemes.values()}) == 1
    ]


def _costs(option: Option, group: Group) -> list[float]:
    purposes = sorted({name for other in group.options for name in other.cost.seconds})
    return [option.cost.bytes, option.cost.cache, *(option.cost.seconds.get(p, 0.0) for p in purposes)]


def _front(prices: NDArray[np.float64]) -> list[int]:
    """The rows that no other row is at most equal to everywhere; of equal rows the first."""
    front = []
    for place, own in enumerate(prices):
        below = (prices <= own).all(1)
        equal = (prices == own).all(1)
        if not (below & ~equal).any() and not equal[:place].any():
            front.append(place)
    return front
