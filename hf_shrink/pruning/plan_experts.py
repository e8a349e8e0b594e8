"""Expert pruning, planned: how many experts go from every mixture, which the method would take, and where they go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_shrink.architectures.binding import Binding
from hf_shrink.architectures.bound import BoundBlock, BoundExperts, BoundStack
from hf_shrink.calibration.capture import first_output
from hf_shrink.calibration.precision import float32_for_now
from hf_shrink.calibration.walk import StackWalk
from hf_shrink.errors import ArchitectureError, CalibrationError, RecipeError
from hf_shrink.plan import BlockPlan
from hf_shrink.progress import ProgressCallback, quiet
from hf_shrink.pruning.base import ExpertMethod, ExpertView
from hf_shrink.recall import Done, recall
from hf_shrink.recipe import PruneStep
from hf_shrink.surgery.depth import stack_configs
from hf_shrink.surgery.experts import group_count, least_in_group

FEW = 32  # tokens: an expert that saw fewer is scored on chance
SHOWN = 8  # experts named in a note


class ExpertPlan(NamedTuple):
    """What is kept of each block that loses experts, by stack name and index, and what the user should know."""

    blocks: dict[tuple[str, int], BlockPlan]
    notes: list[str]


def plan_experts(
    model: nn.Module,
    binding: Binding,
    step: PruneStep,
    method: ExpertMethod,
    batches: Sequence[Mapping[str, Any]],
    *,
    progress: ProgressCallback = quiet,
) -> ExpertPlan:
    """Decide which experts go: the same number from every block that has some. The model is left as it was.

    Args:
        binding: of the model as it is now, its experts taken apart.
        step: with `what: experts`; its ratio counts against all parameters of the binding's blocks.
        batches: model inputs, on which routing is measured.

    Raises:
        ArchitectureError: the family has no role table, or its blocks no experts that can go.
        RecipeError: so many experts cannot go.
        CalibrationError: no data, or numbers that are not finite.
    """
    binding.require_roles()
    mixtures = [(s, [b for b in s.blocks if b.experts is not None]) for s in binding.stacks]
    mixtures = [(stack, blocks) for stack, blocks in mixtures if blocks]
    if not mixtures:
        raise ArchitectureError(
            f"this {binding.model_type!r} model has no experts that its role table knows; prune its depth or width"
        )
    count, notes = _how_many(model, binding, mixtures, step)
    plans: dict[tuple[str, int], BlockPlan] = {}
    if count == 0:
        return ExpertPlan(plans, notes)
    few: dict[str, int] = {}
    for stack, _ in mixtures:
        config = stack_configs(model, stack)[0]
        for block, view in _views(model, stack, batches, progress):
            assert block.experts is not None
            kept = _kept(_checked(method.score(view), block.experts), count, group_count(block.experts, config))
            merges = _merges(view, kept) if method.merge else None
            plans[stack.name, block.index] = BlockPlan(experts=kept, merges=merges)
            few.update({f"{block.experts.path}.{e}": int(n) for e, n in enumerate(view.tokens) if n < FEW})
    return ExpertPlan(plans, notes + _few_notes(few))


def _few_notes(few: Mapping[str, int]) -> list[str]:
    """That experts, by path, saw too few tokens to be judged by them."""
    if not few:
        return []
    shown = ", ".join(f"{expert} ({tokens})" for expert, tokens in list(few.items())[:SHOWN])
    more = f" and {len(few) - SHOWN} more" if len(few) > SHOWN else ""
    return [
        f"{len(few)} experts saw fewer than {FEW} calibration tokens, so that their scores are unsure: {shown}{more}; "
        "more samples or more varied data make them surer"
    ]


def _how_many(
    model: nn.Module, binding: Binding, mixtures: Sequence[tuple[BoundStack, list[BoundBlock]]], step: PruneStep
) -> tuple[int, list[str]]:
    """How many experts go from each mixture, and notes."""
    all_experts = [(b.experts, stack_configs(model, s)[0]) for s, blocks in mixtures for b in blocks if b.experts]
    for experts, _ in all_experts:
        if experts.spec.fixed is not None:
            raise ArchitectureError(f"experts of {experts.path} cannot be removed: {experts.spec.fixed}")
    groups = max(group_count(experts, config) for experts, config in all_experts)
    least = min(experts.count for experts, _ in all_experts)
    most = least - groups * max(least_in_group(experts) for experts, _ in all_experts)
    total = sum(stack.parameters for stack in binding.stacks)
    each = sum(block.expert_parameters for _, blocks in mixtures for block in blocks)
    if step.experts is not None:
        count = step.experts
        if count % groups:
            raise RecipeError(
                f"prune.experts {count}: the router chooses among {groups} groups of experts, from each of which as "
                f"many must go; give a multiple of {groups}"
            )
    else:
        assert step.ratio is not None
        count = round(step.ratio * total / each / groups) * groups
    if count > most:
        raise RecipeError(
            f"prune would remove {count} of {least} experts of a block, at most {most} can go "
            f"({most * each / total:.1%} of the blocks' parameters); lower experts or ratio"
        )
    notes = []
    if step.ratio is not None and abs(count * each / total - step.ratio) > 0.01:
        notes.append(
            f"asked to remove {step.ratio:.1%} of the blocks' parameters, removed {count * each / total:.1%}: {count} "
            "experts a block come nearest"
        )
    return count, notes


def _views(
    model: nn.Module, stack: BoundStack, batches: Sequence[Mapping[str, Any]], progress: ProgressCallback
) -> Iterator[tuple[BoundBlock, ExpertView]]:
    """Every block with experts, and what its router did with the calibration data, in order."""
    walk = StackWalk(model, [block.module for block in stack.blocks], batches)
    last = max(block.index for block in stack.blocks if block.experts is not None)
    course = recall().course(f"scoring experts of {stack.name}")
    for block in stack.blocks[: last + 1]:
        progress("scoring experts", block.index, last + 1)

        def look(block: BoundBlock = block) -> Done:
            with float32_for_now(block.module):
                if block.experts is not None:
                    return Done(tensors=_routing(model, block, walk))
                walk.advance()
            return Done()

        found = course.step(look, walks={"walk": walk}).tensors
        if block.experts is not None:
            moment, routed = found["moment"], found["routed"]
            size = moment.diagonal().sqrt().clamp_min(1e-30)
            yield block, ExpertView(found["tokens"], routed[0], routed[1], moment / size / size[:, None])
    progress("scoring experts", last + 1, last + 1)


def _routing(model: nn.Module, block: BoundBlock, walk: StackWalk) -> dict[str, Tensor]:
    """Send all batches through a block and add up how it routes them."""
    experts = block.experts
    assert experts is not None
    moment = torch.zeros(experts.count, experts.count, dtype=torch.float64)
    routed = torch.zeros(2, experts.count, dtype=torch.float64)
    tokens = torch.zeros(experts.count, dtype=torch.long)
    for batch in range(len(walk.hidden)):
        logits: list[Tensor] = []
        router = model.get_submodule(block.routers[0])
        handle = router.register_forward_hook(lambda _, __, out, seen=logits: seen.append(first_output(out)))
        try:
            output = walk.call(batch)
        finally:
            handle.remove()
        watch = walk.routing(batch)
        tokens += watch.counts[experts.module]
        routed += watch.routed[experts.module]
        real = walk.real_tokens(batch)(logits[0].reshape(-1, experts.count)).double()
        moment += (real.T @ real).cpu()
        walk.take(batch, output)
    walk.step()
    walk.share.add_up(moment, routed, tokens)
    return {"moment": moment, "routed": routed, "tokens": tokens}


def _checked(scores: Tensor, experts: BoundExperts) -> Tensor:
    if scores.shape != (experts.count,):
        raise RecipeError(
            f"{experts.path}: the pruning method gave scores of shape {tuple(scores.shape)} for {experts.count} experts"
        )
    if not torch.isfinite(scores).all():
        raise CalibrationError(f"{experts.path}: scores of experts are NaN or Inf; check weights and calibration data")
    return scores.double().cpu()


def _kept(scores: Tensor, count: int, groups: int) -> tuple[int, ...]:
    """The experts that stay: `count` go, as many from each of the router's groups, the lowest scores first."""
    size, each = len(scores) // groups, count // groups
    kept: list[int] = []
    for group in range(groups):
        order = scores[group * size : (group + 1) * size].argsort(stable=True) + group * size
        kept += order[each:].tolist()
    return tuple(sorted(kept))


def _merges(view: ExpertView, kept: tuple[int, ...]) -> tuple[tuple[int, int, float], ...]:
    """Where the weights of removed experts go: to the kept one whose logits are most alike, weighted by their mass."""
    gone = [expert for expert in range(len(view.tokens)) if expert not in kept]
    into = {expert: kept[int(view.likeness[expert, list(kept)].argmax())] for expert in gone}
    mass = view.mass.clone()
    for expert, target in into.items():
        mass[target] += view.mass[expert]
    return tuple(
        (expert, target, float(view.mass[expert] / mass[target]) if mass[target] > 0 else 0.0)
        for expert, target in into.items()
    )
