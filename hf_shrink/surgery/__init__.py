"""Surgery: cut a model as a Plan says, and keep its config true."""

from __future__ import annotations

from transformers import PreTrainedModel

from hf_shrink.architectures.binding import bind
from hf_shrink.plan import BlockPlan, Plan
from hf_shrink.surgery.depth import remove_blocks, remove_parts, stack_configs, without_blocks
from hf_shrink.surgery.experts import cut_experts
from hf_shrink.surgery.generation import settle_generation
from hf_shrink.surgery.plans import check_plan
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
    check_plan(model, plan)
    binding = bind(model)
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
