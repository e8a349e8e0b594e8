"""Surgery: cut a model as a Plan says, and keep its config true."""

from __future__ import annotations

from transformers import PreTrainedModel

from hf_shrink.architectures.binding import Binding, bind
from hf_shrink.architectures.bound import BoundStack
from hf_shrink.errors import ArchitectureError
from hf_shrink.plan import BlockPlan, Plan, StackPlan
from hf_shrink.surgery.checks import check_units
from hf_shrink.surgery.depth import remove_blocks, remove_parts, stack_configs, without_blocks
from hf_shrink.surgery.expert_channels import check_expert_channels
from hf_shrink.surgery.experts import cut_experts
from hf_shrink.surgery.generation import settle_generation
from hf_shrink.surgery.sizes import build_skeleton, is_uneven, module_shape, resize_skeleton, settle_config
from hf_shrink.surgery.units import consumer_cuts, cut_block, cut_shapes, matrix_cuts

__all__ = [
    "apply_structure",
    "build_skeleton",
    "check_plan",
    "consumer_cuts",
    "cut_block",
    "cut_experts",
    "cut_shapes",
    "is_uneven",
    "matrix_cuts",
    "module_shape",
    "remove_blocks",
    "remove_parts",
    "resize_skeleton",
    "settle_config",
    "settle_generation",
    "stack_configs",
    "without_blocks",
]


def apply_structure(model: PreTrainedModel, plan: Plan) -> None:
    """Everything structural in `plan`, without refit: remove blocks, cut units, settle the configs."""
    binding = bind(model)
    check_plan(binding, plan)
    for name, stack_plan in plan.stacks.items():
        remove_blocks(model, binding.stack(name), stack_plan.kept)
    for name, stack_plan in plan.stacks.items():
        stack = bind(model).stack(name)
        config = stack_configs(model, stack)[0]
        for block, source in zip(stack.blocks, stack_plan.kept, strict=True):
            own = stack_plan.blocks.get(source, BlockPlan())
            if own.experts is not None:
                cut_experts(block, own, config)
                block = bind(model).stack(name).blocks[block.index]
            cut_block(block, own)
            remove_parts(stack, block, own.removed or ())
    settle_config(model)
    settle_generation(model, plan)


def check_plan(binding: Binding, plan: Plan) -> None:
    """Raises ArchitectureError when the plan was made for another model."""
    if plan.model_type != binding.model_type:
        raise ArchitectureError(
            f"the plan was made for a {plan.model_type!r} model, this one is {binding.model_type!r}"
        )
    if plan.stacks:
        binding.require_roles()
    for name, stack_plan in plan.stacks.items():
        stack = binding.stack(name)
        check_units(stack_plan.kept, len(stack.blocks), stack.path, "blocks")
        gone = set(stack_plan.blocks) - set(stack_plan.kept)
        if gone:
            raise ArchitectureError(f"the plan keeps units of blocks that it removes: {sorted(gone)} of {stack.path}")
        _check_parts(stack, stack_plan)
        _check_tied(stack, stack_plan)
        _check_expert_counts(stack, stack_plan)


def _check_expert_counts(stack: BoundStack, plan: StackPlan) -> None:
    """A config has one number of experts, so all mixtures must keep as many."""
    counts = set()
    for block in (stack.blocks[index] for index in plan.kept):
        kept = plan.blocks.get(block.index, BlockPlan()).experts
        if block.experts is not None:
            counts.add(block.experts.count if kept is None else len(kept))
        own = plan.blocks.get(block.index, BlockPlan())
        if block.experts is not None and own.expert_channels is not None:
            check_expert_channels(block.experts, own)
    if len(counts) > 1:
        raise ArchitectureError(
            f"stock transformers reads one number of experts for all blocks of {stack.path}, so a plan must keep as "
            f"many in each, not {sorted(counts)}"
        )


def _check_parts(stack: BoundStack, plan: StackPlan) -> None:
    """A part that goes cannot be cut too, and the first block left of a cached stack keeps its attention."""
    for index, block in plan.blocks.items():
        for part, units in (
            ("attention", block.query_heads),
            ("cross_attention", block.cross_heads),
            ("mlp", block.channels),
        ):
            if part in (block.removed or ()) and units is not None:
                raise ArchitectureError(f"the plan both cuts and removes the {part} of block {index} of {stack.path}")
    first = plan.blocks.get(plan.kept[0], BlockPlan())
    if stack.spec is not None and stack.spec.cached and "attention" in (first.removed or ()):
        raise ArchitectureError(f"{stack.path}: a KV cache takes its length from the attention of the first block")


def _check_tied(stack: BoundStack, plan: StackPlan) -> None:
    """A position bias that goes from block to block has one entry a head, so all blocks must keep the same heads."""
    kept = [plan.blocks.get(index, BlockPlan()) for index in plan.kept]
    for attention, heads in (
        (stack.spec and stack.spec.attention, {block.query_heads for block in kept}),
        (stack.spec and stack.spec.cross_attention, {block.cross_heads for block in kept}),
    ):
        if attention and attention.tied and len(heads) > 1:
            raise ArchitectureError(
                f"all blocks of {stack.path} share one position bias, so a plan must keep the same heads in each"
            )
