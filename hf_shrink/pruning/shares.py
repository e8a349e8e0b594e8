"""From the curves of a model's units to the parts that allocation works with."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hf_shrink.architectures.binding import Binding
from hf_shrink.architectures.bound import BoundAttention, BoundBlock, BoundExperts, BoundMlp, BoundStack
from hf_shrink.ops.removal import RemovalCurve
from hf_shrink.pruning.curves import PartCurves, additive_curve
from hf_shrink.pruning.parts import Kind, Part, attention_ways, channel_ways, expert_ways
from hf_shrink.pruning.prunable import HeadCounts, Prunable, config_key

KINDS: tuple[Kind, ...] = ("attention", "cross_attention", "mlp", "experts")


def parts_of(
    binding: Binding,
    prunable: Prunable,
    curves: Mapping[tuple[str, int, Kind], PartCurves],
    experts_left: Mapping[tuple[str, int], int] | None = None,
) -> list[Part]:
    """A Part for everything that has curves, in the model's order. Curves are in one measure for the whole model.

    `experts_left`: as of `plan_width`.
    """
    left = experts_left or {}
    parts = []
    for stack in binding.stacks:
        for kind in KINDS:
            keys = {block.index: (stack.name, block.index, kind) for block in stack.blocks}
            mean = _mean([curves[key] for key in keys.values() if key in curves])
            for block in stack.blocks:
                found = curves.get(keys[block.index])
                if found is None:
                    continue
                part: BoundAttention | BoundMlp | BoundExperts | None = getattr(block, kind)
                if isinstance(part, BoundMlp):
                    parts.append(_mlp(stack, block, part, found))
                elif isinstance(part, BoundExperts):
                    parts.append(_experts(stack, block, part, found, left.get((stack.name, block.index), part.count)))
                elif part is not None:
                    used = mean if part.spec.tied and mean is not None else found
                    parts.append(_attention(stack, block, part, kind, used, prunable.kinds[stack.name, kind]))
    return parts


def _mean(curves: list[PartCurves]) -> PartCurves | None:
    """Of the mean over blocks of what units cost alone, which decides where all of them must keep the same heads.

    None where sizes differ.
    """
    groups = [found.groups for found in curves if found.groups is not None]
    if not groups or any(found.units.alone.shape != curves[0].units.alone.shape for found in curves):
        return None
    units = [found.units for found in curves]
    return PartCurves(_mean_curve(units, len(groups[0].alone)), _mean_curve(groups))


def _mean_curve(curves: list[RemovalCurve], groups: int | None = None) -> RemovalCurve:
    return additive_curve(torch.stack([curve.alone for curve in curves]).mean(0), groups)


def _mlp(stack: BoundStack, block: BoundBlock, mlp: BoundMlp, curves: PartCurves) -> Part:
    ways = channel_ways(curves.units, mlp.channel_parameters)
    return Part((stack.name, block.index), "mlp", mlp.channels, ways, key=config_key(stack, mlp))


def _experts(stack: BoundStack, block: BoundBlock, experts: BoundExperts, curves: PartCurves, left: int) -> Part:
    ways = expert_ways(curves.units, experts.count, left * experts.channel_parameters)
    units = experts.count * experts.channels
    return Part((stack.name, block.index), "experts", units, ways, key=config_key(stack, experts))


def _attention(
    stack: BoundStack,
    block: BoundBlock,
    attention: BoundAttention,
    kind: Kind,
    curves: PartCurves,
    counts: HeadCounts | None,
) -> Part:
    assert curves.groups is not None
    sizes = attention.head_parameters, attention.group_parameters
    return Part(
        block=(stack.name, block.index),
        kind=kind,
        units=attention.heads,
        ways=attention_ways(curves.units, curves.groups, *sizes, counts),
        key=config_key(stack, attention),
        tied=(stack.name, kind) if attention.spec.tied else None,
    )
