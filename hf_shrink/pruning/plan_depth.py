"""Depth pruning, planned: how many blocks go, which the method would take, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from hf_shrink.architectures.binding import Binding
from hf_shrink.errors import RecipeError
from hf_shrink.progress import ProgressCallback, quiet
from hf_shrink.pruning.base import DepthMethod
from hf_shrink.pruning.goal import Goal
from hf_shrink.pruning.items import Items
from hf_shrink.pruning.measure import MeasuredModel
from hf_shrink.pruning.verify import verify_parts
from hf_shrink.recipe import PruneStep


class DepthPlan(NamedTuple):
    """What is left, what the user should know, and the damage predicted for each item removed.

    Attributes:
        kept: the kept blocks of every stack, by its name.
        parts: the parts that go from kept blocks, by stack name and index.
    """

    kept: Mapping[str, tuple[int, ...]]
    notes: list[str]
    damage: dict[str, float]
    parts: Mapping[tuple[str, int], tuple[str, ...]]


def plan_depth(
    model: nn.Module,
    binding: Binding,
    step: PruneStep,
    method: DepthMethod,
    batches: Sequence[Mapping[str, Any]],
    *,
    portable: bool = True,
    seed: int = 0,
    progress: ProgressCallback = quiet,
) -> DepthPlan:
    """Decide what goes: `step.blocks` items, or as many as come nearest to `step.ratio` of the blocks' parameters.

    Items of all stacks compete; one block is left in every stack, a first block that is built differently stays, and so
    does the attention that a KV cache takes its length from. The model is left as it was.

    Args:
        batches: model inputs, on which the method measures.
        portable: stacks whose depth stock reads from one config key must end equally deep; only whole blocks go.
        seed: which calibration samples are used where a method looks at only some.

    Raises:
        ArchitectureError: the family has no role table, or its parts cannot be left out.
        RecipeError: so much cannot go, or not by this method.
        CalibrationError: no data, or numbers that are not finite.
    """
    binding.require_roles()
    if step.parts != "blocks":
        _check_parts(step, method, portable)
    items = Items(model, binding, step.parts)
    goal = Goal(step, items)
    problem = MeasuredModel(model, items, batches, seed, progress, goal)
    if step.parts != "blocks":
        verify_parts(model, items, batches)
    removed: list[int] = []
    damage: dict[str, float] = {}
    for removal in method.removals(problem) if goal.candidates(removed) else ():
        removed.append(removal.item)
        damage[problem.labels[removal.item]] = removal.damage
        progress("choosing what to remove", len(removed), max(goal.about, len(removed)))
        if not goal.candidates(removed):
            break
    if goal.candidates(removed) or len(set(removed)) < len(removed) or not items.allowed(removed):
        raise RecipeError(f"prune method {step.method!r} has no further block to remove; lower blocks or ratio")
    left = items.left(removed)
    if portable:
        _check_shared_depth(binding, left.kept)
    return DepthPlan(left.kept, [*items.notes, *goal.notes(removed)], damage, left.parts)


def _check_parts(step: PruneStep, method: DepthMethod, portable: bool) -> None:
    if not method.takes_parts:
        raise RecipeError(
            f"prune method {step.method!r} removes whole blocks; take out parts, or use kl_greedy or evolve"
        )
    if portable:
        raise RecipeError(
            f"stock transformers cannot load blocks that lack a part (prune.parts {step.parts}); set portable: false, "
            "or leave prune.parts out to remove whole blocks"
        )


def _check_shared_depth(binding: Binding, kept: Mapping[str, tuple[int, ...]]) -> None:
    depths: dict[tuple[str, str], tuple[str, int]] = {}
    for stack in binding.stacks:
        assert stack.spec is not None
        name, depth = depths.setdefault((stack.spec.config, stack.spec.depth), (stack.name, len(kept[stack.name])))
        if depth != len(kept[stack.name]):
            raise RecipeError(
                f"stock transformers reads the depth of {name!r} and {stack.name!r} from one config key, and they "
                f"would keep {depth} and {len(kept[stack.name])} blocks; set portable: false"
            )
