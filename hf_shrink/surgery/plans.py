"""See that a plan fits a model, before anything is cut."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from hf_shrink.architectures.binding import bind
from hf_shrink.architectures.bound import BoundBlock, BoundStack
from hf_shrink.errors import ArchitectureError
from hf_shrink.plan import BlockPlan, Plan, StackPlan
from hf_shrink.surgery.depth import check_blocks, check_part, stack_configs
from hf_shrink.surgery.experts import check_experts
from hf_shrink.surgery.units import check_cuts


def check_plan(model: nn.Module, plan: Plan) -> None:
    """See that every block has what the plan removes of it.

    Raises:
        ArchitectureError: the plan was made for another model, or names units, parts or blocks that cannot go so.
    """
    binding = bind(model)
    if plan.model_type != binding.model_type:
        raise ArchitectureError(
            f"the plan was made for a {plan.model_type!r} model, this one is {binding.model_type!r}"
        )
    if plan.stacks:
        binding.require_roles()
    for name, stack_plan in plan.stacks.items():
        stack = binding.stack(name)
        check_blocks(stack, stack_plan.kept)
        gone = set(stack_plan.blocks) - set(stack_plan.kept)
        if gone:
            raise ArchitectureError(f"the plan keeps units of blocks that it removes: {sorted(gone)} of {stack.path}")
        config = stack_configs(model, stack)[0]
        for index, block in stack_plan.blocks.items():
            _check_block(stack, stack.blocks[index], block, config)
        _check_parts(stack, stack_plan)
        _check_tied(stack, stack_plan)
        _check_expert_counts(stack, stack_plan)


def _check_block(stack: BoundStack, block: BoundBlock, plan: BlockPlan, config: PretrainedConfig) -> None:
    for part in plan.removed or ():
        check_part(stack, block, part)
    check_cuts(block, plan)
    if plan.experts is None:
        return
    if block.experts is None:
        raise ArchitectureError(f"{block.path} has no experts that could be removed")
    check_experts(block.experts, plan, config)


def _check_expert_counts(stack: BoundStack, plan: StackPlan) -> None:
    """A config has one number of experts, so all mixtures must keep as many."""
    counts = set()
    for block in (stack.blocks[index] for index in plan.kept):
        kept = plan.blocks.get(block.index, BlockPlan()).experts
        if block.experts is not None:
            counts.add(block.experts.count if kept is None else len(kept))
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
