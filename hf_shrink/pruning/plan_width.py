"""Width pruning, planned: score every unit on the dense model, decide how many go where, name the ones that stay."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from hf_shrink.architectures.binding import Binding
from hf_shrink.architectures.bound import BoundAttention, BoundBlock, BoundExperts, BoundMlp
from hf_shrink.calibration.precision import float32_for_now
from hf_shrink.calibration.shelf import Shelf
from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.calibration.walk import StackWalk
from hf_shrink.errors import RecipeError
from hf_shrink.plan import BlockPlan
from hf_shrink.progress import ProgressCallback, quiet
from hf_shrink.pruning.allocate import Request, allocate
from hf_shrink.pruning.base import GradientMethod, WidthMethod
from hf_shrink.pruning.curves import PartCurves
from hf_shrink.pruning.members import by_member, reading_modules
from hf_shrink.pruning.parts import Kind
from hf_shrink.pruning.prunable import Prunable, config_key, find_prunable
from hf_shrink.pruning.refit import LONGEST
from hf_shrink.pruning.scorer import Scorer
from hf_shrink.pruning.sensitivities import mask_gradients
from hf_shrink.pruning.shares import parts_of
from hf_shrink.pruning.trials import Trials
from hf_shrink.recall import Done, recall
from hf_shrink.recipe import PruneStep
from hf_shrink.residence import at_work

FIELDS: dict[Kind, str] = {
    "attention": "query_heads",
    "cross_attention": "cross_heads",
    "mlp": "channels",
    "experts": "expert_channels",
}
NO_SAMPLES = "tokens come to experts without the samples that they are of, by which gradients are scored"


class WidthPlan(NamedTuple):
    """What is kept of each block that loses units, by stack name and index, and what the user should know."""

    blocks: dict[tuple[str, int], BlockPlan]
    notes: list[str]


def plan_width(
    model: nn.Module,
    binding: Binding,
    step: PruneStep,
    method: WidthMethod,
    batches: Sequence[Mapping[str, Any]],
    *,
    portable: bool = True,
    seed: int = 0,
    progress: ProgressCallback = quiet,
    experts_left: Mapping[tuple[str, int], int] | None = None,
) -> WidthPlan:
    """Decide which query heads and channels a step keeps. The model is left as it was.

    Args:
        binding: of the model as it is now; blocks that a depth step takes out are already out of both.
        step: with `what: width`; its ratio counts against all parameters of the binding's blocks, but for experts that
            go.
        batches: model inputs; unused when the method needs no statistics.
        portable: only what stock transformers can load: the same counts in all blocks, heads only where the config has
            a head size of its own.
        seed: which calibration samples are used where only some are looked at.
        experts_left: how many experts an earlier step leaves, by stack name and index of the blocks that lose some;
            model and binding still have all of them.

    Raises:
        ArchitectureError: the family has no role table.
        RecipeError: the ratio would leave nothing of some block, or the asked units cannot be removed.
        CalibrationError: no data for a method that needs it, or numbers that are not finite.
    """
    binding.require_roles()
    assert step.ratio is not None
    prunable = _scored(find_prunable(model, binding, step.units, portable=portable), step, method)
    if step.ratio == 0:
        return WidthPlan({}, list(prunable.notes))
    total = _parameters(binding, experts_left or {})
    request = Request(total, step.ratio, step.units, portable, measured=_compares(binding, prunable, method, portable))
    with Shelf() as shelf:
        scorer = Scorer(method, step, shelf, _gradients(model, binding, prunable, method, batches, seed, progress))
        if request.measured:
            scorer.trials = Trials(model, binding, batches, seed)
        curves = unit_curves(model, binding, prunable, scorer, batches, progress)
        if not request.measured:
            curves = {key: found.shares for key, found in curves.items()}
        try:
            allocation = allocate(parts_of(binding, prunable, curves, experts_left), request)
        except RecipeError as error:
            raise RecipeError("; ".join([str(error), *prunable.notes])) from error
        plans: dict[tuple[str, int], BlockPlan] = {}
        for done, (part, kept) in enumerate(allocation.kept):
            progress("choosing units", done, len(allocation.kept))
            stack, place = part.block
            with at_work(binding.stack(stack).blocks[place].module):
                better = kept if part.tied is not None else scorer.improved(part.block, part.kind, kept)
            plan = plans.get(part.block, BlockPlan())
            experts = binding.stack(stack).blocks[place].experts if part.kind == "experts" else None
            change: dict[str, Any] = {FIELDS[part.kind]: better if experts is None else _by_expert(better, experts)}
            plans[part.block] = dataclasses.replace(plan, **change)
        progress("choosing units", len(allocation.kept), len(allocation.kept))
    return WidthPlan(plans, [*prunable.notes, *allocation.notes])


def _parameters(binding: Binding, experts_left: Mapping[tuple[str, int], int]) -> int:
    """Parameters of all blocks without the experts that go."""
    total = 0
    for stack in binding.stacks:
        for block in stack.blocks:
            total += block.parameters
            if block.experts is not None:
                gone = block.experts.count - experts_left.get((stack.name, block.index), block.experts.count)
                total -= gone * block.expert_parameters
    return total


def _scored(prunable: Prunable, step: PruneStep, method: WidthMethod) -> Prunable:
    """What of it the method can score. Raises RecipeError where that is nothing."""
    mixtures = [stack for stack, kind in prunable.kinds if kind == "experts"]
    if not mixtures or not isinstance(method, GradientMethod):
        return prunable
    kinds = {key: counts for key, counts in prunable.kinds.items() if key[1] != "experts"}
    if not kinds:
        raise RecipeError(f"{step.method} cannot score the channels of experts: {NO_SAMPLES}; use obs or wanda")
    notes = [f"{stack} experts keep all of their channels: {NO_SAMPLES}" for stack in mixtures]
    return Prunable(kinds, (*prunable.notes, *notes))


def _by_expert(kept: Sequence[int], experts: BoundExperts) -> tuple[tuple[int, ...], ...]:
    """From channels numbered one expert's after another's to those of each."""
    return tuple(map(tuple, by_member(kept, experts.channels, experts.count)))


def _compares(binding: Binding, prunable: Prunable, method: WidthMethod, portable: bool) -> bool:
    """Whether it must be measured what losses in one place cost against those in another."""
    if not method.needs_statistics:
        return False
    keys = {
        config_key(stack, part) if portable else (part.path,)
        for stack in binding.stacks
        for kind in FIELDS
        if (stack.name, kind) in prunable.kinds
        for block in stack.blocks
        if (part := getattr(block, kind)) is not None
    }
    return len(keys) > 1


def unit_curves(
    model: nn.Module,
    binding: Binding,
    prunable: Prunable,
    scorer: Scorer,
    batches: Sequence[Mapping[str, Any]],
    progress: ProgressCallback,
) -> dict[tuple[str, int, Kind], PartCurves]:
    """Curves of all units that may go, by stack, block and kind."""
    curves: dict[tuple[str, int, Kind], PartCurves] = {}
    done, total = 0, len(binding.blocks)
    for stack in binding.stacks:
        kinds = [kind for kind in FIELDS if (stack.name, kind) in prunable.kinds]
        walk = None
        if kinds and scorer.method.needs_statistics:
            modules = [block.module for block in stack.blocks]
            walk = StackWalk(model, modules, batches, starved_experts="rtn", fast=True)
        course = recall().course(f"scoring units of {stack.name}")
        for block in stack.blocks:
            progress("scoring units", done, total)
            parts: dict[Kind, BoundAttention | BoundMlp | BoundExperts]
            parts = {kind: part for kind in kinds if (part := getattr(block, kind)) is not None}
            key, last = (stack.name, block.index), block.index + 1 == len(stack.blocks)
            score = functools.partial(_score, scorer, walk, key, block, parts, last)
            found = course.step(score, walks={"walk": walk}).tensors
            for kind, part in parts.items():
                curves[*key, kind] = PartCurves.of(found, kind)
                count = sum(name.startswith(f"{kind}.moments.") for name in found)
                scorer.keep(key, kind, part, [found[f"{kind}.moments.{number}"] for number in range(count)])
            done += 1
    progress("scoring units", done, total)
    return curves


def _score(
    scorer: Scorer,
    walk: StackWalk | None,
    key: tuple[str, int],
    block: BoundBlock,
    parts: Mapping[Kind, BoundAttention | BoundMlp | BoundExperts],
    last: bool,
) -> Done:
    """The curves of a block's parts, and the moments that they are of; the walk goes on to the next block."""
    statistics = _statistics(walk, block, parts, last=last)
    tensors: dict[str, Tensor] = {}
    for kind, part in parts.items():
        with at_work(block.module):
            curves, moments = scorer.curves(key, kind, part, statistics)
        tensors |= curves.tensors(kind)
        tensors |= {f"{kind}.moments.{number}": moment for number, moment in enumerate(moments)}
    return Done(tensors=tensors)


def _gradients(
    model: nn.Module,
    binding: Binding,
    prunable: Prunable,
    method: WidthMethod,
    batches: Sequence[Mapping[str, Any]],
    seed: int,
    progress: ProgressCallback,
) -> dict[str, Tensor]:
    """Mask gradients at the inputs of every matrix that reads units which may go, by path."""
    if not isinstance(method, GradientMethod):
        return {}
    parts = [
        part
        for stack in binding.stacks
        for block in stack.blocks
        for kind in FIELDS
        if (stack.name, kind) in prunable.kinds and (part := getattr(block, kind)) is not None
    ]
    readers = {path: module for part in parts for path, module in reading_modules(part).items()}
    blocks = [block.module for block in binding.blocks]

    def read() -> Done:
        given: dict[str, Any] = {"tokens": method.tokens, "labels": method.labels, "seed": seed, "progress": progress}
        return Done(tensors=mask_gradients(model, blocks, readers, batches, **given))

    return dict(recall().course("reading gradients").step(read).tensors)


def _statistics(
    walk: StackWalk | None,
    block: BoundBlock,
    parts: Mapping[Kind, BoundAttention | BoundMlp | BoundExperts],
    *,
    last: bool,
) -> dict[str, InputStatistics]:
    """Of the inputs of what reads the parts' units, by path; the walk goes on to the next block."""
    if walk is None:
        return {}
    with float32_for_now(block.module):
        matrices = {path: module for part in parts.values() for path, module in reading_modules(part).items()}
        return walk.statistics(matrices, LONGEST, passing=not last)
