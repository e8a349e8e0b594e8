"""Take planned heads and channels out of blocks, with a least-squares refit of what reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from torch import Tensor, nn

from hf_shrink.architectures.binding import bind
from hf_shrink.architectures.bound import BoundBlock
from hf_shrink.architectures.linears import matrix, set_matrix
from hf_shrink.calibration.walk import StackWalk
from hf_shrink.pipeline.kept import KeptStack
from hf_shrink.plan import BlockPlan, StackPlan
from hf_shrink.pruning.refit import refit_columns
from hf_shrink.surgery import consumer_cuts, cut_block


def cut_tied_heads(model: nn.Module, stack: KeptStack) -> tuple[KeptStack, list[str]]:
    """Cut heads that all blocks must have alike (they share a position bias) before any block runs.

    Returns:
        The stack as it is then, with what is left to do, and notes.
    """
    bound = stack.stack
    if bound.spec is None or not any(
        part is not None and part.spec.tied for b in bound.blocks for part in (b.attention, b.cross_attention)
    ):
        return stack, []
    plans = dict(stack.plan.blocks)
    for block, source in zip(bound.blocks, stack.kept, strict=True):
        plan = plans.get(source, BlockPlan())
        if plan.query_heads is None and plan.cross_heads is None:
            continue
        cut_block(block, BlockPlan(query_heads=plan.query_heads, cross_heads=plan.cross_heads))
        plans[source] = BlockPlan(channels=plan.channels)
    notes = []
    if plans != stack.plan.blocks:
        notes.append(
            f"heads of the {bound.name} were cut without refit: blocks share a position bias and lose them at once"
        )
    return KeptStack(bind(model).stack(bound.name), stack.kept, StackPlan(stack.kept, plans)), notes


def cut_and_refit(
    model: nn.Module,
    block: BoundBlock,
    plan: BlockPlan,
    walk: StackWalk | None,
    timed: Callable[[str], AbstractContextManager[None]],
) -> None:
    """Cut a block; with a walk in front of it, refit the matrices that read what was cut to the walk's batches."""
    consumers = consumer_cuts(block, plan) if walk is not None else {}
    refitted = _refitted(model, consumers, walk, timed) if walk is not None and consumers else {}
    cut_block(block, plan)
    for path, weight in refitted.items():
        module = model.get_submodule(path)
        set_matrix(module, weight, module.bias.data if isinstance(module.bias, nn.Parameter) else None)


def _refitted(
    model: nn.Module,
    consumers: Mapping[str, Tensor],
    walk: StackWalk,
    timed: Callable[[str], AbstractContextManager[None]],
) -> dict[str, Tensor]:
    """New weights, by path, of matrices that keep only some of their input columns."""
    modules = {path: model.get_submodule(path) for path in consumers}
    with timed("calibrate"):
        statistics = walk.statistics(modules)
    with timed("solve"):
        return {
            path: refit_columns(matrix(modules[path]).float(), statistics[path], kept)
            for path, kept in consumers.items()
        }
