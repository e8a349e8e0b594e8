"""The pieces that allocation works with: parts of blocks, the ways to remove units from them, and pools of parts."""

from __future__ import annotations

import bisect
from collections.abc import Container, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_shrink.architectures.bound import MULTIPLE
from hf_shrink.ops.removal import RemovalCurve

Kind = Literal["attention", "cross_attention", "mlp", "experts"]
HEADS: tuple[Kind, ...] = ("attention", "cross_attention")


@dataclass(frozen=True)
class Way:
    """One way to take units out of a part: items, in the order in which they go.

    Attributes:
        items: int64 (items, units an item): query heads of a KV group, one query head of every group, a channel, or one
            channel of every expert.
        losses: float64 (items,), ascending: what is lost in all with the first so many items, in a measure that is the
            same for all parts.
        parameters: parameters that go with one item.
        counts: how many items may go, ascending from 0; at least one is always left.
    """

    items: Tensor
    losses: Tensor
    parameters: int
    counts: Sequence[int]

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True)
class Part:
    """The units of one kind in one block.

    Attributes:
        block: stack name and index.
        units: how many query heads or channels it has; of experts the channels of all, one expert's after another's.
        ways: of attention two, whole KV groups or as many query heads from every group; of an MLP or experts one.
        key: parts with the same key take their count from the same config key.
        tied: parts with the same value (not None) must keep the very same units; their ways have the same items.
    """

    block: tuple[str, int]
    kind: Kind
    units: int
    ways: tuple[Way, ...]
    key: Hashable = None
    tied: Hashable = None

    def kept(self, way: int, count: int) -> tuple[int, ...]:
        """The units left after the first `count` items of a way are removed, ascending."""
        left = torch.ones(self.units, dtype=torch.bool)
        left[self.ways[way].items[:count].reshape(-1)] = False
        return tuple(left.nonzero()[:, 0].tolist())


def attention_ways(
    heads: RemovalCurve,
    groups: RemovalCurve,
    head_parameters: int,
    group_parameters: int,
    allowed: Container[tuple[int, int]] | None = None,
) -> tuple[Way, Way]:
    """Whole KV groups, and query heads from within every group.

    Args:
        heads: of query heads, one of every group before the next of any.
        groups: of KV groups.
        allowed: the numbers of (KV groups, query heads in each) that may be left; None: any.
    """
    count, per = len(groups.order), len(heads.order) // len(groups.order)
    members = torch.arange(len(heads.order)).view(count, per)
    fewer_groups = [n for n in range(count) if n == 0 or allowed is None or (count - n, per) in allowed]
    smaller_groups = [n for n in range(per) if n == 0 or allowed is None or (count, per - n) in allowed]
    return (
        Way(members[groups.order], groups.losses, group_parameters, fewer_groups),
        Way(heads.order.view(per, count), heads.losses[count - 1 :: count], head_parameters * count, smaller_groups),
    )


def channel_ways(channels: RemovalCurve, parameters: int) -> tuple[Way]:
    """Channels one by one."""
    return (Way(channels.order[:, None], channels.losses, parameters, range(len(channels.order))),)


def expert_ways(channels: RemovalCurve, experts: int, parameters: int) -> tuple[Way]:
    """As many channels from every expert, in steps that leave what can be multiplied.

    Args:
        channels: of all experts, one of each before the next of any.
        parameters: that go with one channel of every expert.
    """
    each = len(channels.order) // experts
    items, losses = channels.order.view(each, experts), channels.losses[experts - 1 :: experts]
    step = 1 if each % MULTIPLE else MULTIPLE
    return (Way(items, losses, parameters, range(0, each, step)),)


@dataclass(frozen=True)
class Choice:
    """`count` items of way `way`, from every part of a pool."""

    way: int
    count: int
    removed: int


@dataclass(frozen=True)
class Pool:
    """Parts that lose the same number of items in the same way."""

    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        """Parameters of all of its units."""
        return max(self.unit(way) * len(self.parts[0].ways[way]) for way in self.ways)

    @property
    def ways(self) -> range:
        return range(len(self.parts[0].ways))

    def unit(self, way: int) -> int:
        """Parameters that go with one item from every part."""
        return sum(part.ways[way].parameters for part in self.parts)

    def cost(self, way: int, count: int) -> float:
        return sum(float(part.ways[way].losses[count - 1]) for part in self.parts) if count else 0.0

    def counts(self, way: int) -> Sequence[int]:
        """How many items can go, ascending from 0."""
        first, *others = (part.ways[way].counts for part in self.parts)
        if all(counts == first for counts in others):
            return first
        return [count for count in first if all(count in counts for counts in others)]

    @property
    def most(self) -> int:
        """The most parameters that can go."""
        return max(self.unit(way) * self.counts(way)[-1] for way in self.ways)

    def choice(self, way: int, count: int) -> Choice:
        return Choice(way, count, self.unit(way) * count)

    def nearest(self, wanted: float, limit: float = float("inf")) -> list[Choice]:
        """For every way the choice nearest to `wanted` parameters, not above `limit`; it may remove nothing."""
        found = []
        for way in self.ways:
            unit, counts = self.unit(way), self.counts(way)
            above = bisect.bisect_left(counts, min(wanted, limit) / unit)
            near = [counts[i] for i in (above - 1, above) if 0 <= i < len(counts) and counts[i] * unit <= limit]
            found.append(self.choice(way, min(near, key=lambda n: abs(n * unit - wanted), default=0)))
        return found

    def cheaper(self, choices: Sequence[Choice]) -> Choice:
        """The choice whose removal costs least per parameter; one that removes nothing only if all do."""
        removing = [choice for choice in choices if choice.count]
        if not removing:
            return choices[0]
        return min(removing, key=lambda c: self.cost(c.way, c.count) / c.removed)


def pools_by(parts: Iterable[Part], *, portable: bool) -> list[Pool]:
    """Parts that must agree, together: by config key when portable, else only where they are tied."""
    groups: dict[Hashable, list[Part]] = {}
    for part in parts:
        apart = (part.block, part.kind) if part.tied is None else part.tied
        groups.setdefault(part.key if portable else apart, []).append(part)
    return [Pool(tuple(group)) for group in groups.values()]
