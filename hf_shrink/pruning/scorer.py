"""Curves of a block's units, in nats of the predictions where they are measured, and better sets of units from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hf_shrink.architectures.bound import BoundAttention, BoundExperts, BoundMlp
from hf_shrink.architectures.linears import bias_of, matrix
from hf_shrink.calibration.shelf import Shelf
from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.pruning.base import OrderingMethod, WidthMethod
from hf_shrink.pruning.curves import PartCurves, curve_of
from hf_shrink.pruning.members import Member, by_member, joined, members
from hf_shrink.pruning.parts import Kind
from hf_shrink.pruning.refit import refit_reader
from hf_shrink.pruning.trials import Trials
from hf_shrink.pruning.units import channel_view, group_view, head_view, reader
from hf_shrink.recipe import PruneStep

Block = tuple[str, int]  # stack name and index


@dataclass
class Scorer:
    """Asks the method.

    Attributes:
        shelf: for the second moments of all parts that may be improved in the end.
        gradients: by a mask on each input of a reading matrix, by its path, for methods that look at them.
        trials: measures what losses cost; None: losses are as the method gives them.
    """

    method: WidthMethod
    step: PruneStep
    shelf: Shelf
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    trials: Trials | None = None
    _parts: dict[tuple[Block, Kind], list[Member]] = field(default_factory=dict)

    def curves(
        self,
        block: Block,
        kind: Kind,
        part: BoundAttention | BoundMlp | BoundExperts,
        statistics: Mapping[str, InputStatistics],
    ) -> tuple[PartCurves, list[Tensor]]:
        """What the units of a part cost, and the moments that `keep` wants.

        Args:
            statistics: of the inputs of what reads them, by path, see `members`.
        """
        own = members(part, statistics, needed=self.method.needs_statistics, centred=self.step.refit)
        curves = [self._curves(member) for member in own]
        found = curves[0]
        if isinstance(part, BoundExperts):
            scaled = [one.units.scaled(member.weight) for one, member in zip(curves, own, strict=True)]
            found = PartCurves(joined(scaled))
        if self.trials is not None and any(member.statistics is not None for member in own):
            found = found.scaled(self._cost_of_loss(self.trials, block, part, own, found))
        moments = [member.moment for member in own if member.moment is not None]
        return found, moments if isinstance(self.method, OrderingMethod) else []

    def keep(
        self, block: Block, kind: Kind, part: BoundAttention | BoundMlp | BoundExperts, moments: Sequence[Tensor]
    ) -> None:
        """Remember a part that may be improved in the end, with what `curves` said of it; none where it cannot be."""
        if not isinstance(self.method, OrderingMethod):
            return
        self.shelf.take(len(self._parts), moments)
        own = members(part, {}, needed=False, centred=False)
        given: Sequence[Tensor | None] = moments or [None] * len(own)
        self._parts[block, kind] = [replace(m, moment=moment) for m, moment in zip(own, given, strict=True)]

    def _curves(self, member: Member) -> PartCurves:
        part, moment = member.part, member.moment
        gradients = self.gradients.get(reader(part).path)
        if isinstance(part, BoundMlp):
            return PartCurves(curve_of(self.method, channel_view(part, moment, gradients), part.path))
        heads = curve_of(self.method, head_view(part, moment, gradients), part.path)
        return PartCurves(heads, curve_of(self.method, group_view(part, moment, gradients), part.path))

    def improved(self, block: Block, kind: Kind, kept: Sequence[int]) -> tuple[int, ...]:
        """As many units to keep in place of `kept`, where the method knows better ones."""
        if not isinstance(self.method, OrderingMethod):
            return tuple(kept)
        self.shelf.give_back(list(self._parts).index((block, kind)))
        own = self._parts[block, kind]
        first, found = units_of(own[0].part), []
        for number, (member, there) in enumerate(zip(own, by_member(kept, first, len(own)), strict=True)):
            found += [unit + number * first for unit in self._better(member, there)]
        return tuple(found)

    def _better(self, member: Member, kept: Sequence[int]) -> list[int]:
        assert isinstance(self.method, OrderingMethod)
        part, moment, units = member.part, member.moment, units_of(member.part)
        if moment is not None:  # it may have been in a file
            moment = moment.to(matrix(part.modules[reader(part).path]).device)
        there = torch.zeros(units, dtype=torch.bool)
        there[list(kept)] = True
        if isinstance(part, BoundMlp):
            view = channel_view(part, moment)
        elif len(kept) == len(part.groups_of(kept)) * part.heads_per_group:  # whole groups went
            view, there = group_view(part, moment), there[:: part.heads_per_group]
        else:
            view = head_view(part, moment)
        removed = self.method.improved(view, (~there).nonzero()[:, 0])
        there.fill_(True)
        there[removed] = False
        if isinstance(part, BoundAttention) and len(there) < units:
            there = there.repeat_interleave(part.heads_per_group)
        left: list[int] = there.nonzero()[:, 0].tolist()
        return left

    def _cost_of_loss(
        self,
        trials: Trials,
        block: Block,
        part: BoundAttention | BoundMlp | BoundExperts,
        own: Sequence[Member],
        curves: PartCurves,
    ) -> float:
        """Nats of KL divergence for one unit of the method's loss, measured near the asked ratio."""
        assert self.step.ratio is not None
        removed, loss = _probe(part, curves, self.step.ratio)
        if loss <= 0:
            return 0.0
        gone, first = set(removed), units_of(own[0].part)
        changes: list[tuple[Tensor, Tensor]] = []
        for number, member in enumerate(own):
            kept = [unit for unit in range(first) if unit + number * first not in gone]
            changes += self._masked(member, kept)
        return trials.divergence_of(changes, block) / loss

    def _masked(self, member: Member, units: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """What reads a member's units, and how it is with some of them only; refitted where that is wanted."""
        slot = reader(member.part)
        module = member.part.modules[slot.path]
        kept = slot.positions(units).sort().values
        weight, bias = matrix(module).float(), bias_of(module)
        masked = torch.zeros_like(weight)
        if not self.step.refit or member.statistics is None:
            masked[:, kept] = weight[:, kept]
            return [(matrix(module), masked)]
        refitted = refit_reader(weight, bias, member.statistics, kept)
        masked[:, kept] = refitted.weight
        changes = [(matrix(module), masked)]
        if bias is not None and refitted.bias is not None:
            changes.append((bias, refitted.bias))
        return changes


def units_of(part: BoundAttention | BoundMlp) -> int:
    """How many channels or query heads."""
    return part.channels if isinstance(part, BoundMlp) else part.heads


def _probe(part: BoundAttention | BoundMlp | BoundExperts, curves: PartCurves, ratio: float) -> tuple[list[int], float]:
    """About `ratio` of a part's units, in the order of the cheaper curve, that cost anything; and what they cost."""
    ways = [(curves.units, 1)] if isinstance(part, BoundMlp) else []
    ways += [(curves.units, part.count)] if isinstance(part, BoundExperts) else []
    if isinstance(part, BoundAttention):
        ways += [(curves.units, part.kv_heads)] if part.heads_per_group > 1 else []
        assert curves.groups is not None
        ways += [(curves.groups, 1)] if part.kv_heads > 1 else []
    probes: list[tuple[list[int], float]] = []
    for curve, together in ways:
        most = len(curve.order) // together
        count = min(max(round(ratio * most), 1), most - 1) * together
        while count + together < len(curve.order) and curve.losses[count - 1] <= 1e-12 * curve.total:
            count += together
        if count:
            removed = curve.order[:count].tolist()
            if curve is curves.groups and isinstance(part, BoundAttention):
                per = part.heads_per_group
                removed = [head for group in removed for head in range(group * per, (group + 1) * per)]
            probes.append((removed, float(curve.losses[count - 1])))
    return min(probes, key=lambda probe: probe[1] / len(probe[0]), default=([], 0.0))
