"""From a recipe to a Plan: what is removed, decided on the dense model, and the scheme of every weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_shrink.architectures.absent import without_parts
from hf_shrink.architectures.binding import Binding, bind
from hf_shrink.errors import ArchitectureError, RecipeError
from hf_shrink.pipeline.budget import plan_budget
from hf_shrink.pipeline.formats import check_dtypes, resolve_formats
from hf_shrink.pipeline.leaves import cut_by, narrowed_by, removed_by, without_removed
from hf_shrink.pipeline.recipes import (
    depth_method,
    expert_method,
    hidden_method,
    quantization_method,
    weights_method,
    width_method,
)
from hf_shrink.pipeline.targets import resolve_schemes
from hf_shrink.pipeline.transforming import transform_notes
from hf_shrink.pipeline.vocabulary import plan_tokens
from hf_shrink.pipeline.weights import choose_weights
from hf_shrink.plan import BlockPlan, Plan, Scheme, StackPlan, WeightsPlan
from hf_shrink.progress import ProgressCallback
from hf_shrink.pruning.plan_depth import plan_depth
from hf_shrink.pruning.plan_experts import plan_experts
from hf_shrink.pruning.plan_hidden import plan_hidden
from hf_shrink.pruning.plan_width import plan_width
from hf_shrink.quantization.base import ModelMethod
from hf_shrink.recipe import QuantizeStep, Recipe
from hf_shrink.runtime.experts import separate_experts
from hf_shrink.surgery import without_blocks


@dataclass(frozen=True)
class Planned:
    """A plan, and what the user should know about how it came to be."""

    plan: Plan
    notes: tuple[str, ...]


def find_binding(model: nn.Module) -> Binding | None:
    """The model's binding; None for a plain module, which can only be quantized, without data."""
    return bind(model) if isinstance(model, PreTrainedModel) else None


def plan_recipe(
    model: nn.Module,
    recipe: Recipe,
    batches: Sequence[Mapping[str, Any]],
    seed: int,
    progress: ProgressCallback,
    processing: Any = None,
) -> Planned:
    """Decide everything. The model is left as it was.

    Args:
        processing: the model's tokenizer or processor, which a smaller vocabulary needs.

    Raises:
        RecipeError: the recipe cannot be met on this model.
        ArchitectureError: pruning of a family without a role table.
    """
    if recipe.budget is not None:
        found_plan, said = plan_budget(model, recipe, batches, seed, progress)
        return Planned(found_plan, tuple(said))
    binding = find_binding(model)
    notes: list[str] = []
    stacks: dict[str, StackPlan] = {}
    damage: dict[str, float] = {}
    depth, width, quantize = recipe.prune("depth"), recipe.prune("width"), recipe.quantize
    experts, hidden, vocabulary = recipe.prune("experts"), recipe.prune("hidden"), recipe.prune("vocabulary")
    prunes = bool(depth or width or experts or hidden)
    if (prunes or vocabulary) and (binding is None or not isinstance(model, PreTrainedModel)):
        raise ArchitectureError("only transformers models can be pruned; this module can be quantized (method: rtn)")
    if prunes:
        assert binding is not None
        binding.require_roles()
    if depth:
        assert binding is not None
        found = plan_depth(
            model,
            binding,
            depth,
            depth_method(depth),
            batches,
            portable=recipe.portable,
            seed=seed,
            progress=progress,
        )
        notes += found.notes
        damage = found.damage
        stacks = {
            name: StackPlan(
                blocks,
                {i: BlockPlan(removed=parts) for (stack, i), parts in found.parts.items() if stack == name},
            )
            for name, blocks in found.kept.items()
        }
    narrower_stream = None
    experts_left: dict[tuple[str, int], int] = {}
    if hidden:
        assert isinstance(model, PreTrainedModel) and binding is not None
        with without_planned(model, binding, stacks) as (shallower, _):
            narrowing = plan_hidden(model, shallower, hidden, hidden_method(hidden))
        narrower_stream = narrowing.plan
        notes += narrowing.notes
    if experts:
        assert binding is not None
        with without_planned(model, binding, stacks) as (_, sources), experts_apart(model) as apart:
            assert apart is not None
            fewer = plan_experts(model, apart, experts, expert_method(experts), batches, progress=progress)
            stacks = _with_blocks(apart, sources, stacks, fewer.blocks)
        experts_left = {key: len(block.experts) for key, block in fewer.blocks.items() if block.experts is not None}
        notes += fewer.notes
    if width:
        assert binding is not None
        with without_planned(model, binding, stacks) as (_, sources), experts_apart(model) as smaller:
            assert smaller is not None
            narrower = plan_width(
                model,
                smaller,
                width,
                width_method(width),
                batches,
                portable=recipe.portable,
                seed=seed,
                progress=progress,
                experts_left=experts_left,
            )
            stacks = _with_blocks(smaller, sources, stacks, narrower.blocks)
        notes += narrower.notes
    zeroing = recipe.prune("weights")
    without_data = zeroing is not None and zeroing.starved_experts == "magnitude"
    tokens = plan_tokens(model, vocabulary, processing, batches, seed, progress)
    notes += tokens.notes if tokens else []
    plan = Plan(
        model_type=binding.model_type if binding is not None else type(model).__name__,
        depths=binding.depths if binding is not None else {},
        stacks={name: stack for name, stack in stacks.items() if not _keeps_all(binding, name, stack)},
        refit=width.refit if width else False,
        repair=bool(depth and depth.refit and damage),
        # An expert without statistics loses channels too, by its weights alone.
        starved_experts="rtn" if without_data or any(stack.cuts_experts for stack in stacks.values()) else "error",
        damage=damage,
        vocabulary=tokens.plan if tokens else None,
        hidden=narrower_stream,
        dtype=recipe.dtype,
        calibration=asdict(recipe.calibration),
    )
    if zeroing:
        with experts_apart(model) as apart:
            chosen = choose_weights(
                model,
                apart,
                zeroing,
                weights_method(zeroing),
                gone=lambda path: removed_by(path, binding, plan),
                narrowed=narrowed_by(model, binding, plan),
            )
        weights = WeightsPlan(zeroing.method, chosen.amounts, dict(zeroing.options), zeroing.refit)
        plan = replace(plan, weights=weights)
        notes += chosen.notes
    if quantize:
        if quantize.transforms and binding is None:
            raise RecipeError("only transformers models have transforms; leave quantize.transforms out for this module")
        schemes, formats, found_notes = _resolve(model, binding, recipe, quantize, plan)
        plan = replace(
            plan,
            schemes=schemes,
            formats=formats,
            method=quantize.method,
            options=dict(quantize.options),
            transforms=quantize.transforms,
            tune=dict(quantize.tune),
            starved_experts=quantize.starved_experts,
            effort=quantize.effort,
        )
        plan = without_removed(plan, binding)
        notes += [*found_notes, *transform_notes(plan)]
    if not plan.prunes and not plan.bits and plan.vocabulary is None and plan.weights is None:
        raise RecipeError("the recipe changes nothing on this model; raise ratio or blocks, or add a quantize step")
    return Planned(plan, tuple(notes))


def _resolve(
    model: nn.Module, binding: Binding | None, recipe: Recipe, step: QuantizeStep, plan: Plan
) -> tuple[dict[str, Scheme], dict[str, str], Sequence[str]]:
    """Schemes or formats of the weights that the step quantizes, and notes. `plan`: what is removed before it."""
    method = quantization_method(step)
    if not isinstance(method, ModelMethod):
        with experts_apart(model) as apart:
            resolved = resolve_schemes(model, apart, step, recipe.portable, narrowed_by(model, binding, plan))
        return resolved.schemes, {}, resolved.notes
    if plan.prunes and not recipe.portable:
        raise RecipeError(
            f"{step.format} is stored by stock transformers, which cannot say uneven shapes: prune with portable: true"
        )
    formats, notes = resolve_formats(model, binding, step, method, cut_by(model, binding, plan))
    check_dtypes(model, formats, recipe.dtype)
    return {}, formats, notes


@contextmanager
def experts_apart(model: nn.Module) -> Iterator[Binding | None]:
    """The model with its experts as Linears that look into the 3D parameters: its binding. As it was afterwards."""
    undo = separate_experts(model)
    try:
        yield find_binding(model)
    finally:
        undo()


@contextmanager
def without_planned(
    model: nn.Module, binding: Binding, stacks: Mapping[str, StackPlan]
) -> Iterator[tuple[Binding, dict[str, tuple[int, ...]]]]:
    """The model with the planned blocks and parts out: its binding, and the source index of every block left."""
    sources = {s.name: stacks[s.name].kept if s.name in stacks else tuple(range(len(s.blocks))) for s in binding.stacks}
    with ExitStack() as stack:
        for bound in binding.stacks:
            removed = sorted(set(range(len(bound.blocks))) - set(sources[bound.name]))
            if removed:
                stack.enter_context(without_blocks(model, bound, removed))
            gone = stacks[bound.name].blocks if bound.name in stacks else {}
            takings = [
                (bound.blocks[i].module, bound.spec, b.removed) for i, b in gone.items() if bound.spec and b.removed
            ]
            stack.enter_context(without_parts(takings))
        yield bind(model), sources


def _with_blocks(
    binding: Binding,
    sources: Mapping[str, tuple[int, ...]],
    stacks: Mapping[str, StackPlan],
    blocks: Mapping[tuple[str, int], BlockPlan],
) -> dict[str, StackPlan]:
    """Stack plans with what a step keeps of the blocks, renumbered from the depth-pruned to the source's blocks."""
    merged = {}
    for bound in binding.stacks:
        kept = sources[bound.name]
        own = dict(stacks[bound.name].blocks) if bound.name in stacks else {}
        for (name, i), plan in blocks.items():
            if name == bound.name and not plan.keeps_all:
                decided = {f.name: v for f in fields(plan) if (v := getattr(plan, f.name)) is not None}
                own[kept[i]] = replace(own.get(kept[i], BlockPlan()), **decided)
        if own or bound.name in stacks:
            merged[bound.name] = StackPlan(kept, own)
    return merged


def _keeps_all(binding: Binding | None, name: str, stack: StackPlan) -> bool:
    assert binding is not None
    return not stack.blocks and len(stack.kept) == len(binding.stack(name).blocks)
