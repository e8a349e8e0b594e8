"""Take planned heads and channels out of blocks, with a least-squares refit of what reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from hf_shrink.architectures.binding import bind
from hf_shrink.architectures.bound import BoundBlock
from hf_shrink.architectures.linears import bias_of, matrix
from hf_shrink.calibration.dense_stream import DenseStream
from hf_shrink.calibration.passed import Passed
from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.calibration.walk import StackWalk
from hf_shrink.pipeline.kept import KeptStack
from hf_shrink.plan import BlockPlan, StackPlan
from hf_shrink.pruning.refit import LONGEST, refit_reader
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
    walk: StackWalk,
    dense: DenseStream | None,
    timed: Callable[[str], AbstractContextManager[None]],
    *,
    further: bool,
) -> Passed | None:
    """Cut a block, and refit the matrices that read what was cut to the dense model's outputs.

    Stage by stage: what reads the heads is refitted, and then what reads the channels, on what that puts out.

    Args:
        walk: in front of the block.
        dense: in front of it too; after this it is behind it.
        further: whether the walk shall go through the cut block.

    Returns:
        The block's outputs for the first batch, with the walk gone on if asked. None when the block cannot be stopped
        between its stages: then it is cut, refitted to what its own dense matrices give, and the walk stays.
    """
    consumers = consumer_cuts(block, plan)
    modules = {path: model.get_submodule(path) for path in consumers}

    def refit(found: Mapping[str, InputStatistics | None]) -> None:
        with timed("solve"):
            for path, statistics in found.items():
                if statistics is None:  # of an expert that saw too few tokens
                    _mask(modules[path], consumers[path])
                else:
                    refit_masked(modules[path], statistics, consumers[path])

    with timed("calibrate"):
        passed = walk.advance_in_stages(
            modules,
            refit,
            model.get_submodule,
            further=further,
            dense=dense,
            longest=dict.fromkeys(modules, LONGEST),
        )
        if passed is None:
            if dense is not None:
                dense.advance()
            found = walk.statistics(modules, LONGEST)
            refit({path: found.get(path) for path in modules})
        elif not further:
            walk.reference = passed.before
    cut_block(block, plan)
    return passed


def _mask(module: nn.Module, kept: Tensor) -> None:
    """Make a matrix's other columns zero, in place."""
    weight = matrix(module)
    there = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    there[kept.to(weight.device)] = True
    weight[:, ~there] = 0


def refit_masked(module: nn.Module, statistics: InputStatistics, kept: Tensor) -> None:
    """Refit a matrix in place; its other columns become zero, which is as good as cut."""
    weight, bias = matrix(module), bias_of(module)
    refitted = refit_reader(weight, bias, statistics, kept)
    masked = torch.zeros_like(weight)
    masked[:, kept.to(weight.device)] = refitted.weight.to(weight.dtype)
    weight.copy_(masked)
    if bias is not None and refitted.bias is not None:
        bias.copy_(refitted.bias)
