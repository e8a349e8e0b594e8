"""Depth pruning, planned: how many blocks go, which the method would take, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from hf_shrink.architectures.binding import Binding
from hf_shrink.errors import RecipeError
from hf_shrink.progress import ProgressCallback, quiet
from hf_shrink.pruning.base import DepthMethod, DepthProblem
from hf_shrink.pruning.measure import MeasuredModel
from hf_shrink.recipe import PruneStep


class DepthPlan(NamedTuple):
    """The kept blocks of every stack, what the user should know, and the damage predicted for each removed block."""

    kept: dict[str, tuple[int, ...]]
    notes: list[str]
    damage: dict[str, float]


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
    """Decide which blocks go: `step.blocks` of them, or the number whose parameters come nearest to `step.ratio`.

    Blocks of all stacks compete; one is left in every stack, and a first block that is built differently always stays.
    The model is left as it was.

    Args:
        batches: model inputs, on which the method measures.
        portable: stacks whose depth stock reads from one config key must end equally deep.
        seed: which calibration samples are used where a method looks at only some.

    Raises:
        ArchitectureError: the family has no role table.
        RecipeError: so many blocks cannot go.
        CalibrationError: no data, or numbers that are not finite.
    """
    binding.require_roles()
    problem = MeasuredModel(model, binding, batches, seed, progress)
    goal = _Goal(step, problem)
    removed: list[int] = []
    damage: dict[str, float] = {}
    removals = method.removals(problem)
    while goal.wants_more(removed):
        removal = next(removals, None)
        if removal is None or removal.block not in problem.candidates(removed):
            raise RecipeError(f"prune method {step.method!r} has no further block to remove; lower blocks or ratio")
        removed.append(removal.block)
        damage[problem.labels[removal.block]] = removal.damage
        progress("removing blocks", len(removed), goal.about)
    kept = problem.kept(removed)
    if portable:
        _check_shared_depth(binding, kept)
    notes = [*problem.notes, *goal.notes(removed)]
    return DepthPlan(kept, notes, damage)


class _Goal:
    """When enough is removed. Raises RecipeError at once when it cannot be reached."""

    def __init__(self, step: PruneStep, problem: MeasuredModel) -> None:
        self._step = step
        self._sizes = problem.sizes
        self._problem: DepthProblem = problem
        most = self._largest_removal(problem)
        if step.blocks is not None:
            self.about = step.blocks
            if step.blocks > len(most):
                raise RecipeError(
                    f"prune.blocks {step.blocks} would leave a stack of this model without blocks it needs; at most "
                    f"{len(most)} of its {len(self._sizes)} blocks can go"
                )
            return
        assert step.ratio is not None
        self._target = step.ratio * sum(self._sizes)
        self.about = round(step.ratio * len(self._sizes))
        possible = sum(self._sizes[block] for block in most)
        if self._target > possible + min(self._sizes) / 2:
            raise RecipeError(
                f"prune.ratio {step.ratio:g} would leave a stack of this model without blocks it needs; at most "
                f"{int(1000 * possible / sum(self._sizes)) / 10:g}% of the block parameters can go"
            )

    @staticmethod
    def _largest_removal(problem: MeasuredModel) -> list[int]:
        removed: list[int] = []
        while left := problem.candidates(removed):
            removed.append(max(left, key=lambda block: problem.sizes[block]))
        return removed

    def wants_more(self, removed: Sequence[int]) -> bool:
        if self._step.blocks is not None:
            return len(removed) < self._step.blocks
        left = self._problem.candidates(removed)
        gone = sum(self._sizes[block] for block in removed)
        return bool(left) and gone + min(self._sizes[block] for block in left) / 2 < self._target

    def notes(self, removed: Sequence[int]) -> list[str]:
        if self._step.ratio is None:
            return []
        share = sum(self._sizes[block] for block in removed) / sum(self._sizes)
        if abs(share - self._step.ratio) <= 0.01:
            return []
        return [
            f"asked to remove {self._step.ratio:.1%} of the blocks' parameters, removed {share:.1%}: {len(removed)} "
            "whole blocks come nearest"
        ]


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
