"""Heads and channels that go gradually while a model is trained, and are cut when it ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_shrink.architectures.adapters import without_adapters
from hf_shrink.architectures.binding import Binding, bind
from hf_shrink.architectures.bound import BoundAttention, BoundMlp, Cuts
from hf_shrink.checkpoint.record import ShrinkRecord
from hf_shrink.errors import ArchitectureError, RecipeError, ShrinkError
from hf_shrink.plan import BlockPlan, StackPlan
from hf_shrink.pruning.allocate import Allocation, Request, allocate
from hf_shrink.pruning.base import WIDTH, GradientMethod, WidthMethod
from hf_shrink.pruning.curves import PartCurves, additive_curve, curve_of
from hf_shrink.pruning.parts import Kind
from hf_shrink.pruning.plan_width import FIELDS
from hf_shrink.pruning.prunable import Prunable, find_prunable
from hf_shrink.pruning.shares import parts_of
from hf_shrink.pruning.units import channel_view, group_view, head_view, reader
from hf_shrink.recipe import PruneStep
from hf_shrink.registry import did_you_mean
from hf_shrink.surgery import check_plan, cut_block
from hf_shrink.training.models import is_sharded
from hf_shrink.training.pruning.collecting import Collected
from hf_shrink.training.pruning.gate import Gate, remove_gates
from hf_shrink.training.pruning.scoring import SCORES, TrainingScore
from hf_shrink.training.schedule import Window

Place = tuple[str, int, Kind]  # stack, block, kind of unit


@dataclass(frozen=True)
class _Units:
    """The units of one part of one block, and the gate in front of what reads them."""

    part: BoundAttention | BoundMlp
    gate: Gate


class GradualWidth:
    """A `Part`: `prune: {what: width}`.

    Before every change of the masks all units are ranked anew and allocated as `shrink` does it, with as much of the
    ratio as the schedule has come to; so which block loses how many may shift on the way.
    """

    adds_parameters: ClassVar[bool] = False

    def __init__(self, step: PruneStep, *, portable: bool) -> None:
        """Raises RecipeError for a method or an option that training does not know."""
        self._step, self._portable = step, portable
        self._score, self._method = _methods(step)
        self._units: dict[Place, _Units] = {}

    def attach(self, model: PreTrainedModel) -> None:
        remove_gates(model)
        with without_adapters(model):
            self._binding: Binding = bind(model)
            _check_no_experts(self._binding)
            self._prunable: Prunable = find_prunable(model, self._binding, self._step.units, portable=self._portable)
            self._total = sum(stack.parameters for stack in self._binding.stacks)
            self._all = sum(parameter.numel() for parameter in model.parameters())
        for stack in self._binding.stacks:
            for block in stack.blocks:
                for kind in FIELDS:
                    part: BoundAttention | BoundMlp | None = getattr(block, kind)
                    if part is not None and (stack.name, kind) in self._prunable.kinds:
                        slot = reader(part)
                        gate = Gate(slot.index, self._score)
                        self._units[stack.name, block.index, kind] = _Units(part, gate)
                        gate.place(model.get_submodule(slot.path))
        self._collected = Collected(self._score, [len(units.gate.mask) for units in self._units.values()])
        self._allocation = self._allocate(1.0)  # raises what the end would raise

    def attach_copy(self, model: PreTrainedModel) -> None:
        pass

    def begin(self, model: PreTrainedModel, window: Window) -> None:
        if self._score is None and is_sharded(model):
            raise ShrinkError(
                f"{self._step.method} looks at whole weights, which FSDP has spread; use taylor, fisher or movement"
            )
        self._window = window
        somewhere = next(model.parameters()).device
        for units in self._units.values():
            module = units.part.modules[reader(units.part).path]
            units.gate.reset(next((p.device for p in module.parameters()), somewhere))
        self._collected.reset(somewhere)
        self._removed, self._changed, self._settled = 0, 0, False

    def settled(self, window: Window) -> int:
        return window.end

    def before_optimizer_step(self, step: int, scale: float) -> None:
        if self._score is not None and not self._settled:
            self._collected.add([units.gate.collected() for units in self._units.values()], scale)

    def after_step(self, step: int) -> None:
        if not self._window.due(step):
            return
        self._allocation = self._allocate(self._window.progress(step))
        self._removed = self._allocation.removed
        before = self._kept()
        kept = {(*part.block, part.kind): units for part, units in self._allocation.kept}
        for place, units in self._units.items():
            mask = torch.ones(len(units.gate.mask), dtype=torch.bool)
            if place in kept:
                mask.zero_()[list(kept[place])] = True
            units.gate.close(mask)
        self._changed = int((before != self._kept()).sum())
        if step == self._window.end:
            self._settle()

    def finish(self, model: PreTrainedModel, record: ShrinkRecord) -> None:
        remove_gates(model)
        plans: dict[str, dict[int, BlockPlan]] = {}
        for (stack, index, kind), units in self._units.items():
            kept = units.gate.mask.bool().cpu()
            if not kept.all():
                own = plans.setdefault(stack, {})
                change: dict[str, Any] = {FIELDS[kind]: tuple(kept.nonzero()[:, 0].tolist())}
                own[index] = replace(own.get(index, BlockPlan()), **change)
        binding = bind(model)
        stacks = {
            name: StackPlan(tuple(range(len(binding.stack(name).blocks))), blocks) for name, blocks in plans.items()
        }
        record.plan = replace(record.plan, stacks=stacks, refit=False)
        check_plan(model, record.plan)
        for name, stack_plan in stacks.items():
            for block in binding.stack(name).blocks:
                cut_block(block, stack_plan.blocks.get(block.index, BlockPlan()))
        record.report.notes += [*self._prunable.notes, *self._allocation.notes]

    def cuts(self) -> Cuts:
        """The rows and columns that are behind open gates at present, of every matrix that makes or reads units."""
        found: Cuts = {}
        for units in self._units.values():
            found |= units.part.cuts(units.gate.mask.detach().bool().cpu().nonzero()[:, 0].tolist())
        return found

    def tensors(self) -> dict[str, Tensor]:
        counts = torch.tensor([self._removed, self._changed, int(self._settled)])
        return {"kept": self._kept(), "counts": counts, **self._collected.tensors()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        parts = torch.split(tensors["kept"], [len(units.gate.mask) for units in self._units.values()])
        for units, kept in zip(self._units.values(), parts, strict=True):
            units.gate.close(kept)
        self._collected.load(tensors)
        self._removed, self._changed, settled = tensors["counts"].tolist()
        if settled:
            self._settle()

    def figures(self) -> dict[str, float]:
        """The fraction of the blocks' parameters behind closed gates, what the cut model would have, and the fraction
        of the units that the last change of the masks took or gave back."""
        return {
            "sparsity": self._removed / self._total,
            "parameters": float(self._all - self._removed),
            "mask_churn": self._changed / len(self._kept()),
        }

    def _settle(self) -> None:
        self._settled = True
        for units in self._units.values():
            units.gate.settle()

    def _kept(self) -> Tensor:
        """bool (all units,)."""
        return torch.cat([units.gate.mask.detach().bool().cpu() for units in self._units.values()])

    def _allocate(self, fraction: float) -> Allocation:
        assert self._step.ratio is not None
        scores = self._collected.costs(self._kept())
        curves = {
            place: self._curves(units.part, score)
            for (place, units), score in zip(self._units.items(), scores, strict=True)
        }
        request = Request(self._total, self._step.ratio * fraction, self._step.units, self._portable)
        return allocate(parts_of(self._binding, self._prunable, curves), request)

    def _curves(self, part: BoundAttention | BoundMlp, costs: Tensor) -> PartCurves:
        """What losing units costs, as shares of what the whole part is worth. `costs`: float64 (units,)."""
        attention = part if isinstance(part, BoundAttention) else None
        if self._method is None:
            groups = attention.kv_heads if attention is not None else None
            by_group = None if groups is None else additive_curve(costs.view(groups, -1).sum(1))
            return PartCurves(additive_curve(costs, groups), by_group).shares
        if isinstance(part, BoundMlp):
            return PartCurves(curve_of(self._method, channel_view(part, None), part.path)).shares
        heads, by_group = (curve_of(self._method, view(part, None), part.path) for view in (head_view, group_view))
        return PartCurves(heads, by_group).shares


def _check_no_experts(binding: Binding) -> None:
    binding.require_roles()
    if mixed := [block.path for block in binding.blocks if block.experts is not None]:
        raise ArchitectureError(
            f"{mixed[0]} is a mixture of experts, whose heads and channels do not go gradually yet; run `shrink` with "
            "the width step, and train the smaller model with what is left of the recipe"
        )


def _methods(step: PruneStep) -> tuple[TrainingScore | None, WidthMethod | None]:
    """A score of training, or a method of `shrink` that looks at weights only."""
    if step.method in SCORES.names():
        return SCORES.build(step.method, step.options), None
    weights_only = [n for n in WIDTH.names() if not _needs_data(WIDTH.build(n, {}))]
    if step.method not in WIDTH.names():
        raise RecipeError(
            f"unknown method {step.method!r} of width pruning in training; "
            f"{did_you_mean(step.method, [*SCORES.names(), *weights_only])}"
        )
    method = WIDTH.build(step.method, step.options)
    if _needs_data(method):
        raise RecipeError(
            f"{step.method} needs calibration data, which training does not have; use one of "
            f"{', '.join([*SCORES.names(), *weights_only])}, or `shrink` before training"
        )
    return None, method


def _needs_data(method: WidthMethod) -> bool:
    return method.needs_statistics or isinstance(method, GradientMethod)
