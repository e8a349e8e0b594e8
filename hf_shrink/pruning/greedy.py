"""The greedy loop: try what could go, remove what costs least for its size, repeat."""

from __future__ import annotations

from collections.abc import Iterator

from hf_shrink.pruning.base import DepthProblem, Look, Removal


def cheapest_first(problem: DepthProblem, look: Look, shortlist: int | None) -> Iterator[Removal]:
    """Items by the divergence that each adds for its size, measured anew after every removal.

    Args:
        shortlist: after the first round, try only this many, those that cost least when they were last tried; None:
            all.
    """
    removed: list[int] = []
    now = 0.0
    costs: dict[int, float] = {}  # nats for the size, when last tried
    while left := problem.candidates(removed):
        order = sorted(left, key=lambda item: (costs.get(item, 0.0), item))
        tried = sorted(order[:shortlist] if costs else order)
        found = problem.divergences(removed, [[*removed, item] for item in tried], look)
        for item, value in zip(tried, found, strict=True):
            costs[item] = (value - now) / problem.sizes[item]
        best = min(tried, key=lambda item: (costs[item], item))
        now = found[tried.index(best)]
        removed.append(best)
        yield Removal(best, now)
