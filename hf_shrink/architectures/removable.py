"""What can be taken out of a stack, in words."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_shrink.architectures.inspect import Block, Stack


def alike(blocks: Iterable[Block]) -> list[list[Block]]:
    """Runs of blocks of the same sizes."""
    return [list(run) for _, run in groupby(blocks, key=lambda block: block.form)]


def span(blocks: list[Block]) -> str:
    """The numbers of blocks in a row."""
    first, last = blocks[0].index, blocks[-1].index
    return f"block {first}" if first == last else f"blocks {first}-{last}"


def removable(stack: Stack) -> list[str]:
    """A line for every kind of thing."""
    lines = []
    for blocks in alike(stack.blocks):
        heads, channels = blocks[0].heads, blocks[0].channels
        has = [f"{heads.kv_groups} KV groups of {heads.per_group} query heads of {heads.size}"] if heads else []
        has += [f"{channels} channels"] if channels else []
        has += [f"{blocks[0].experts} experts of {blocks[0].expert_channels} channels"] if blocks[0].experts else []
        lines.append(f"{span(blocks)}: {', '.join(has) or 'no units'}")
    if stack.depth_fixed is not None:
        lines.append(f"no block can be removed: {stack.depth_fixed}")
    else:
        lines.append("blocks: any but the first" if stack.first_stays else "blocks: any, at least one stays")
    if any(block.experts for block in stack.blocks):
        lines.append("experts: any number, portable; all blocks must keep as many")
        form = "portable when all blocks agree" if stack.portable_expert_channels else "uneven"
        lines.append(f"channels of experts: multiples of 8 stay, of all experts of a block as many, {form}")
    if stack.heads_fixed is not None:
        lines.append(f"no heads can be removed: {stack.heads_fixed}")
    elif stack.blocks[0].heads is not None:
        groups, each = stack.portable_heads[0]
        fewer = [f"{groups} x {each}" for groups, each in stack.portable_heads[1:]]
        if len(fewer) == groups * each - 1 > 0:
            fewer = ["any"]
        tied = "; all blocks must keep the same ones" if stack.heads_tied else ""
        lines.append(f"heads, portable (KV groups x query heads, in all blocks): {', '.join(fewer) or 'none'}{tied}")
    if any(block.channels is not None for block in stack.blocks):
        lines.append(
            f"channels: any number, {'portable' if stack.portable_channels else 'uneven'} when all blocks agree"
        )
    return lines
