"""Give a dense block the form that it had when an earlier process had finished it. Its values come from a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from hf_shrink.architectures.binding import bind
from hf_shrink.checkpoint.skeleton import empty_compressed
from hf_shrink.pipeline.kept import KeptStack
from hf_shrink.plan import BlockPlan
from hf_shrink.surgery import cut_block, cut_experts, stack_configs

if TYPE_CHECKING:
    from hf_shrink.pipeline.running import Run


def rebuild(run: Run, stack: KeptStack, place: int) -> None:
    """Cut the stack's block at `place` and put empty packed modules into it, as the plan says."""
    block = stack.stack.blocks[place]
    plan = stack.plan.blocks.get(stack.kept[place], BlockPlan())
    now = block if block.experts is None else bind(run.model).stack(stack.stack.name).blocks[block.index]
    if plan.experts is not None:
        cut_experts(now, plan, stack_configs(run.model, stack.stack)[0])
        now = bind(run.model).stack(stack.stack.name).blocks[block.index]
    if not plan.keeps_all:
        cut_block(now, plan)
    for path in run.work:
        if path.startswith(block.path + ".") and path in run.schemes and run.method is not None:
            dense = run.model.get_submodule(path)
            packed = empty_compressed(dense, run.schemes[path])
            packed.train(dense.training)
            bias = getattr(dense, "bias", None)
            if isinstance(bias, nn.Parameter):
                packed.bias = bias
            packed.sparse = run.masking is not None and path in run.masking.holders
            run.model.set_submodule(path, packed)
