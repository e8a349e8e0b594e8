"""Width pruning, planned: score every unit on the dense model, decide how many go where, name the ones that stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_shrink.architectures.binding import Binding
from hf_shrink.architectures.bound import BoundAttention, BoundBlock, BoundMlp, BoundStack
from hf_shrink.calibration.precision import float32_for_now
from hf_shrink.calibration.walk import StackWalk
from hf_shrink.errors import CalibrationError, RecipeError
from hf_shrink.plan import BlockPlan
from hf_shrink.progress import ProgressCallback, quiet
from hf_shrink.pruning.allocate import Request, allocate
from hf_shrink.pruning.base import GradientMethod, WidthMethod
from hf_shrink.pruning.parts import Kind
from hf_shrink.pruning.prunable import Prunable, find_prunable
from hf_shrink.pruning.sensitivities import mask_gradients
from hf_shrink.pruning.shares import Scores, parts_of
from hf_shrink.pruning.units import channel_view, group_view, head_view
from hf_shrink.recipe import PruneStep

FIELDS: dict[Kind, str] = {"attention": "query_heads", "cross_attention": "cross_heads", "mlp": "channels"}


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
) -> WidthPlan:
    """Decide which query heads and channels a step keeps. The model is left as it was.

    Args:
        binding: of the model as it is now; blocks that a depth step takes out are already out of both.
        step: with `what: width`; its ratio counts against all parameters of the binding's blocks.
        batches: model inputs; unused when the method needs no statistics.
        portable: only what stock transformers can load: the same counts in all blocks, heads only where the config has
            a head size of its own.
        seed: which calibration samples are used where a method looks at only some.

    Raises:
        ArchitectureError: the family has no role table.
        RecipeError: the ratio would leave nothing of some block, or the asked units cannot be removed.
        CalibrationError: no data for a method that needs it, or numbers that are not finite.
    """
    binding.require_roles()
    assert step.ratio is not None
    prunable = find_prunable(model, binding, step.units, portable=portable)
    if step.ratio == 0:
        return WidthPlan({}, list(prunable.notes))
    gradients = _gradients(model, binding, prunable, method, batches, seed, progress)
    scores = _score(model, binding, prunable, method, batches, gradients, progress)
    request = Request(sum(stack.parameters for stack in binding.stacks), step.ratio, step.units, portable)
    allocation = allocate(parts_of(binding, prunable, scores), request)
    plans: dict[tuple[str, int], BlockPlan] = {}
    for part, kept in allocation.kept:
        plan = plans.get(part.block, BlockPlan())
        change: dict[str, Any] = {FIELDS[part.kind]: kept}
        plans[part.block] = dataclasses.replace(plan, **change)
    return WidthPlan(plans, [*prunable.notes, *allocation.notes])


def _score(
    model: nn.Module,
    binding: Binding,
    prunable: Prunable,
    method: WidthMethod,
    batches: Sequence[Mapping[str, Any]],
    gradients: Mapping[str, Tensor],
    progress: ProgressCallback,
) -> dict[tuple[str, int, Kind], Scores]:
    """Scores of all units that may go, by stack, block and kind."""
    scores: dict[tuple[str, int, Kind], Scores] = {}
    done, total = 0, len(binding.blocks)
    for stack in binding.stacks:
        kinds = [kind for kind in FIELDS if (stack.name, kind) in prunable.kinds]
        walk = None
        if kinds and method.needs_statistics:
            walk = StackWalk(model, [block.module for block in stack.blocks], batches)
        for block in stack.blocks:
            progress("scoring units", done, total)
            if kinds:
                for kind, found in _score_block(stack, block, kinds, method, walk, gradients).items():
                    scores[stack.name, block.index, kind] = found
            done += 1
    progress("scoring units", done, total)
    return scores


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
    readers = {path: part.modules[path] for part in parts for path in [_reader(part)]}
    blocks = [block.module for block in binding.blocks]
    return mask_gradients(
        model,
        blocks,
        readers,
        batches,
        tokens=method.tokens,
        labels=method.labels,
        seed=seed,
        progress=progress,
    )


def _reader(part: BoundAttention | BoundMlp) -> str:
    """Path of the matrix that reads a part's units."""
    return part.slot("down" if isinstance(part, BoundMlp) else "output").path


def _score_block(
    stack: BoundStack,
    block: BoundBlock,
    kinds: Sequence[Kind],
    method: WidthMethod,
    walk: StackWalk | None,
    gradients: Mapping[str, Tensor],
) -> dict[Kind, Scores]:
    parts: dict[Kind, BoundAttention | BoundMlp]
    parts = {kind: part for kind in kinds if (part := getattr(block, kind)) is not None}
    moments: dict[Kind, Tensor] = {}
    if walk is not None:
        with float32_for_now(block.module):
            readers = {kind: _reader(part) for kind, part in parts.items()}
            statistics = walk.statistics({path: parts[kind].modules[path] for kind, path in readers.items()})
            moments = {kind: statistics[path].mean for kind, path in readers.items()}
            del statistics
            if block.index + 1 < len(stack.blocks):
                walk.advance()
    return {
        kind: _score_part(part, method, moments.get(kind), gradients.get(_reader(part))) for kind, part in parts.items()
    }


def _score_part(
    part: BoundAttention | BoundMlp, method: WidthMethod, moment: Tensor | None, gradients: Tensor | None
) -> Scores:
    if isinstance(part, BoundMlp):
        return Scores(_checked(method.score(channel_view(part, moment, gradients)), part.channels, part.path))
    heads = _checked(method.score(head_view(part, moment, gradients)), part.heads, part.path)
    return Scores(heads, _checked(method.score(group_view(part, moment, gradients)), part.kv_heads, part.path))


def _checked(scores: Tensor, units: int, path: str) -> Tensor:
    """The scores on the CPU in float64."""
    if scores.shape != (units,):
        raise RecipeError(f"{path}: the pruning method gave scores of shape {tuple(scores.shape)} for {units} units")
    scores = scores.double().cpu()
    if not torch.isfinite(scores).all():
        raise CalibrationError(f"{path}: scores of units are NaN or Inf; check its weights and the calibration data")
    return scores
