"""Statistics that several processes took on their shares of the batches, brought together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from hf_shrink.calibration.statistics import Drift, DriftSums, InputStatistics
from hf_shrink.sharding import Share


class _Kind(NamedTuple):
    """What a process has at a path.

    Attributes:
        owner: the first path with the same object.
    """

    owner: str
    width: int
    longest: float | None
    drifts: bool


def merged(found: Mapping[str, InputStatistics | None], share: Share) -> dict[str, InputStatistics | None]:
    """Statistics of all processes' batches, by path, in the objects that are given where there are some.

    Paths that have one object in common go on having one. None where no process has anything.

    Args:
        found: of this process's batches, not finished yet; None for matrices that saw none of them.
        share: which these are.
    """
    if share.ranks.size == 1:
        return dict(found)
    result: dict[str, InputStatistics | None] = {}
    described = share.ranks.gather(_described(found))
    device = next((s.hessian.device for s in found.values() if s is not None), torch.device("cpu"))
    for path, own in found.items():
        kinds = [kinds[path] for kinds in described if path in kinds]
        if not kinds:
            result[path] = None
        elif kinds[0].owner != path:
            result[path] = result[kinds[0].owner]
        else:
            statistics = own or InputStatistics.empty(kinds[0].width, device, kinds[0].longest)
            if statistics.drift is None and any(kind.drifts for kind in kinds):
                statistics.drift = Drift.empty(kinds[0].width, statistics.hessian.device)
            _merge(statistics, share)
            result[path] = statistics
    return result


def _described(found: Mapping[str, InputStatistics | None]) -> dict[str, _Kind]:
    owners: dict[int, str] = {}
    return {
        path: _Kind(owners.setdefault(id(s), path), len(s.hessian), s.longest, s.drift is not None)
        for path, s in found.items()
        if s is not None
    }


def _merge(statistics: InputStatistics, share: Share) -> None:
    sums: list[Tensor] = [statistics.hessian]
    drifts: list[DriftSums] = []
    if statistics.total is not None:
        sums.append(statistics.total)
    if statistics.largest is not None:
        share.highest(statistics.largest)
    if statistics.drift is not None:
        drifts = [statistics.drift.measured, statistics.drift.held]
    for drift in drifts:
        sums += [drift.cross, drift.hessian, drift.shift, drift.total]
    share.add_up(*sums)
    parts: list[InputStatistics | DriftSums] = [statistics, *drifts]
    counts = share.totals([value for part in parts for value in (part.tokens, part.weight)])
    for place, part in enumerate(parts):
        part.tokens, part.weight = int(counts[2 * place]), counts[2 * place + 1]
