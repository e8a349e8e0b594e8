"""Which units may leave a part together, and what that costs: a few sizes that kernels and groups of columns like."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_shrink.architectures.binding import Binding
from hf_shrink.architectures.bound import MULTIPLE, BoundAttention, BoundExperts, BoundMlp
from hf_shrink.errors import RecipeError
from hf_shrink.plan import BlockPlan
from hf_shrink.pruning.curves import PartCurves
from hf_shrink.pruning.parts import Kind, Way, attention_ways, channel_ways, expert_ways
from hf_shrink.pruning.plan_width import FIELDS
from hf_shrink.pruning.prunable import HeadCounts, Prunable, find_prunable

SHARES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4)  # of a part's units that may be left
STEP = 32  # left channels are a multiple of it, where there are many


@dataclass(frozen=True)
class Cut:
    """Some units of a part left.

    Attributes:
        name: "1216 channels", "2 KV groups", "2 x 2 heads"; empty where all are left.
        plan: what is kept, of that part only.
        damage: nats.
        left: bool (units,), of query heads or channels; of experts of the channels of all, one's after another's.
        kv_heads: KV groups left; 0 of an MLP.
    """

    name: str
    plan: BlockPlan
    damage: float
    left: Tensor
    kv_heads: int = 0


def prunable_units(model: nn.Module, binding: Binding, *, portable: bool) -> Prunable | None:
    """Which kinds of units may go at all; None where none may, which leaves bits and depth to search."""
    try:
        return find_prunable(model, binding, "all", portable=portable)
    except RecipeError:
        return None


def cuts_of(
    part: BoundAttention | BoundMlp,
    kind: Kind,
    curves: PartCurves | None,
    counts: HeadCounts | None,
    multiple: int = STEP,
) -> list[Cut]:
    """The whole part first, then smaller ones.

    Args:
        curves: in nats; None: nothing may go.
        counts: the numbers of (KV groups, query heads in each) that may be left; None: any.
        multiple: channels come in multiples of it.
    """
    units = part.channels if isinstance(part, BoundMlp) else part.heads
    whole = Cut("", BlockPlan(), 0.0, torch.ones(units, dtype=torch.bool), getattr(part, "kv_heads", 0))
    if curves is None:
        return [whole]
    if isinstance(part, BoundMlp):
        (way,) = channel_ways(curves.units, part.channel_parameters)
        return [whole, *_cuts(part, kind, way, _channel_counts(units, multiple))]
    assert curves.groups is not None
    sizes = part.head_parameters, part.group_parameters
    groups, heads = attention_ways(curves.units, curves.groups, *sizes, counts)
    return [whole, *_cuts(part, kind, groups, _few(groups.counts)), *_cuts(part, kind, heads, _few(heads.counts))]


def expert_cuts(experts: BoundExperts, curves: PartCurves | None, multiple: int = STEP) -> list[Cut]:
    """All channels of all experts first, then fewer of each; arguments as of `cuts_of`."""
    each, units = experts.channels, experts.channels * experts.count
    found = [Cut("", BlockPlan(), 0.0, torch.ones(units, dtype=torch.bool))]
    if curves is None:
        return found
    (way,) = expert_ways(curves.units, experts.count, experts.count * experts.channel_parameters)
    for count in _channel_counts(each, multiple, 1 if each % MULTIPLE else MULTIPLE):
        left = torch.ones(units, dtype=torch.bool)
        left[way.items[:count].reshape(-1)] = False
        kept = tuple(tuple(own.nonzero()[:, 0].tolist()) for own in left.view(experts.count, each))
        plan = BlockPlan(expert_channels=kept)
        found.append(Cut(f"{each - count} channels of each", plan, float(way.losses[count - 1]), left))
    return found


def _channel_counts(units: int, multiple: int, least: int = 1) -> list[int]:
    """How many channels may go; what is left is a multiple of `least`, and of `multiple` where there are many."""
    step = multiple if units >= 2 * multiple else least
    left = {max(step, round(share * units / step) * step) for share in SHARES}
    return [units - count for count in sorted(left, reverse=True) if count < units]


def _few(counts: Sequence[int]) -> list[int]:
    """At most as many as there are SHARES, evenly spread."""
    some = [count for count in counts if count]
    if len(some) <= len(SHARES):
        return some
    return sorted({some[round(n * (len(some) - 1) / (len(SHARES) - 1))] for n in range(len(SHARES))})


def _cuts(part: BoundAttention | BoundMlp, kind: Kind, way: Way, counts: Sequence[int]) -> Iterator[Cut]:
    units = part.channels if isinstance(part, BoundMlp) else part.heads
    for count in counts:
        left = torch.ones(units, dtype=torch.bool)
        left[way.items[:count].reshape(-1)] = False
        kept = tuple(left.nonzero()[:, 0].tolist())
        changes: dict[str, Any] = {FIELDS[kind]: kept}
        groups = 0 if isinstance(part, BoundMlp) else len(part.groups_of(kept))
        name = f"{len(kept)} channels" if not groups else f"{groups} KV groups of {len(kept) // groups}"
        yield Cut(name, BlockPlan(**changes), float(way.losses[count - 1]), left, groups)
