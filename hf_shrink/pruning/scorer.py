"""Curves of a block's units, in nats of the predictions where they are measured, and better sets of units from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_shrink.architectures.bound import BoundAttention, BoundMlp
from hf_shrink.architectures.linears import bias_of, matrix
from hf_shrink.calibration.shelf import Shelf
from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.pruning.base import OrderingMethod, WidthMethod
from hf_shrink.pruning.curves import PartCurves, curve_of
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
    _parts: dict[tuple[Block, Kind], tuple[BoundAttention | BoundMlp, Tensor | None]] = field(default_factory=dict)

    def curves(
        self, block: Block, kind: Kind, part: BoundAttention | BoundMlp, statistics: InputStatistics | None
    ) -> PartCurves:
        """What the units of a part cost. `statistics`: of the input of what reads them, as `reader` says."""
        moment = None
        if statistics is not None:
            centred = self.step.refit and bias_of(part.modules[reader(part).path]) is not None
            moment = statistics.covariance if centred else statistics.mean
        gradients = self.gradients.get(reader(part).path)
        if isinstance(part, BoundMlp):
            found = PartCurves(curve_of(self.method, channel_view(part, moment, gradients), part.path))
        else:
            heads = curve_of(self.method, head_view(part, moment, gradients), part.path)
            found = PartCurves(heads, curve_of(self.method, group_view(part, moment, gradients), part.path))
        if self.trials is not None and statistics is not None:
            found = found.scaled(self._cost_of_loss(self.trials, block, part, found, statistics))
        if isinstance(self.method, OrderingMethod):
            if moment is not None:
                self.shelf.take(len(self._parts), [moment])
            self._parts[block, kind] = part, moment
        return found

    def improved(self, block: Block, kind: Kind, kept: Sequence[int]) -> tuple[int, ...]:
        """As many units to keep in place of `kept`, where the method knows better ones."""
        if not isinstance(self.method, OrderingMethod):
            return tuple(kept)
        owner = list(self._parts).index((block, kind))
        part, moment = self._parts[block, kind]
        self.shelf.give_back(owner)
        units = part.channels if isinstance(part, BoundMlp) else part.heads
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
        return tuple(there.nonzero()[:, 0].tolist())

    def _cost_of_loss(
        self,
        trials: Trials,
        block: Block,
        part: BoundAttention | BoundMlp,
        curves: PartCurves,
        statistics: InputStatistics,
    ) -> float:
        """Nats of KL divergence for one unit of the method's loss, measured near the asked ratio."""
        assert self.step.ratio is not None
        removed, loss = _probe(part, curves, self.step.ratio)
        if loss <= 0:
            return 0.0
        slot = reader(part)
        module = part.modules[slot.path]
        units = part.channels if isinstance(part, BoundMlp) else part.heads
        kept = slot.positions(sorted(set(range(units)) - set(removed))).sort().values
        weight = matrix(module).float()
        bias = bias_of(module)
        masked = torch.zeros_like(weight)
        if self.step.refit:
            refitted = refit_reader(weight, bias, statistics, kept)
            masked[:, kept], bias = refitted.weight, refitted.bias
        else:
            masked[:, kept] = weight[:, kept]
        return trials.divergence(block, module, masked, bias) / loss


def _probe(part: BoundAttention | BoundMlp, curves: PartCurves, ratio: float) -> tuple[list[int], float]:
    """About `ratio` of a part's units, in the order of the cheaper curve, that cost anything; and what they cost."""
    ways = [(curves.units, 1)] if isinstance(part, BoundMlp) else []
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
