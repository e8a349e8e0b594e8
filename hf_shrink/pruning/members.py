"""What is scored by itself: an attention, an MLP, or each expert of a mixture, whose experts lose as many channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_shrink.architectures.bound import BoundAttention, BoundExperts, BoundMlp
from hf_shrink.architectures.experts import expert_mlps
from hf_shrink.architectures.linears import bias_of, matrix
from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.ops.removal import RemovalCurve
from hf_shrink.pruning.units import reader


@dataclass
class Member:
    """One of the things that a part is made of; of all but experts there is one.

    Attributes:
        moment: of the inputs of what reads the units; None where the method looks at none.
        weight: its share of the part's tokens.
        statistics: what the moment is of; None where there are none, as of experts that hardly a token comes to.
    """

    part: BoundAttention | BoundMlp
    moment: Tensor | None = None
    weight: float = 1.0
    statistics: InputStatistics | None = None


def reading_modules(part: BoundAttention | BoundMlp | BoundExperts) -> dict[str, torch.nn.Module]:
    """The matrices that read a part's units, by path."""
    parts = expert_mlps(part) if isinstance(part, BoundExperts) else (part,)
    return {reader(own).path: own.modules[reader(own).path] for own in parts}


def members(
    part: BoundAttention | BoundMlp | BoundExperts,
    statistics: Mapping[str, InputStatistics],
    *,
    needed: bool,
    centred: bool,
) -> list[Member]:
    """A part's members.

    Args:
        statistics: of the inputs of what reads the units, by path; none of experts that saw too few tokens.
        needed: whether the method looks at second moments. An expert without any is judged by its weights, as if all
            inputs of what reads its units were alike and independent.
        centred: whether a refit puts the mean of what goes into the reader's bias, where there is one.
    """
    if not isinstance(part, BoundExperts):
        found = statistics.get(reader(part).path)
        return [Member(part, None if found is None else _moment(part, found, centred), 1.0, found)]
    own = expert_mlps(part)
    tokens = [found.tokens if (found := statistics.get(reader(mlp).path)) is not None else 0 for mlp in own]
    total = sum(tokens)
    return [
        _expert(mlp, statistics.get(reader(mlp).path), needed, max(n, 1) / total if total else 1.0)
        for mlp, n in zip(own, tokens, strict=True)
    ]


def _expert(mlp: BoundMlp, found: InputStatistics | None, needed: bool, weight: float) -> Member:
    moment = None if found is None else found.mean
    if needed and moment is None:
        moment = torch.eye(mlp.channels, device=matrix(mlp.modules[reader(mlp).path]).device)
    return Member(mlp, moment, weight, found)


def _moment(part: BoundAttention | BoundMlp, found: InputStatistics, centred: bool) -> Tensor:
    return found.covariance if centred and bias_of(part.modules[reader(part).path]) is not None else found.mean


def joined(curves: Sequence[RemovalCurve]) -> RemovalCurve:
    """The curve of all units of several members alike: one unit of each goes before the next of any.

    Units are numbered one member's after another's.
    """
    each, count = len(curves[0].order), len(curves)
    order = torch.stack([curve.order + number * each for number, curve in enumerate(curves)], dim=1)
    losses = torch.stack([curve.losses for curve in curves], dim=1)
    steps = losses.diff(dim=0, prepend=losses.new_zeros(1, count))
    return RemovalCurve(order.reshape(-1), steps.reshape(-1).cumsum(0), torch.cat([curve.alone for curve in curves]))


def by_member(units: Sequence[int], each: int, count: int) -> list[list[int]]:
    """From units numbered one member's after another's, `each` a member, to those of each."""
    found: list[list[int]] = [[] for _ in range(count)]
    for unit in units:
        found[unit // each].append(unit % each)
    return found
