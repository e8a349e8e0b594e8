"""Scores of units as shares of their block's total, and from them the parts that allocation works with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_shrink.architectures.binding import Binding
from hf_shrink.architectures.bound import BoundAttention, BoundBlock, BoundMlp, BoundStack
from hf_shrink.pruning.parts import Kind, Part, attention_ways, channel_ways
from hf_shrink.pruning.prunable import HeadCounts, Prunable, config_key

KINDS: tuple[Kind, ...] = ("attention", "cross_attention", "mlp")


@dataclass(frozen=True)
class Scores:
    """float64 scores of one part's query heads or channels, and of its KV groups."""

    units: Tensor
    groups: Tensor | None = None

    @property
    def shares(self) -> Scores:
        """Divided by the part's total; all 0 where nothing scores anything.

        Heads are divided by the groups' total too, so that both ways to remove them are measured alike.
        """
        total = self.units.sum() if self.groups is None else self.groups.sum()
        scale = 1 / total if total > 0 else torch.zeros_like(total)
        return Scores(self.units * scale, None if self.groups is None else self.groups * scale)


def parts_of(binding: Binding, prunable: Prunable, scores: Mapping[tuple[str, int, Kind], Scores]) -> list[Part]:
    """A Part for everything that was scored, in the model's order."""
    shares = {key: found.shares for key, found in scores.items()}
    parts = []
    for stack in binding.stacks:
        for kind in KINDS:
            keys = {block.index: (stack.name, block.index, kind) for block in stack.blocks}
            mean = _mean([shares[key] for key in keys.values() if key in shares])
            for block in stack.blocks:
                found = shares.get(keys[block.index])
                if found is None:
                    continue
                part: BoundAttention | BoundMlp | None = getattr(block, kind)
                if isinstance(part, BoundMlp):
                    parts.append(_mlp(stack, block, part, found))
                elif part is not None:
                    used = mean if part.spec.tied and mean is not None else found
                    parts.append(_attention(stack, block, part, kind, used, prunable.kinds[stack.name, kind]))
    return parts


def _mean(shares: list[Scores]) -> Scores | None:
    """The mean over blocks, which decides where all of them must keep the same heads; None where sizes differ."""
    groups = [found.groups for found in shares if found.groups is not None]
    if not groups or any(found.units.shape != shares[0].units.shape for found in shares):
        return None
    return Scores(torch.stack([found.units for found in shares]).mean(0), torch.stack(groups).mean(0))


def _mlp(stack: BoundStack, block: BoundBlock, mlp: BoundMlp, shares: Scores) -> Part:
    ways = channel_ways(shares.units, mlp.channel_parameters)
    return Part((stack.name, block.index), "mlp", mlp.channels, ways, key=config_key(stack, mlp))


def _attention(
    stack: BoundStack,
    block: BoundBlock,
    attention: BoundAttention,
    kind: Kind,
    shares: Scores,
    counts: HeadCounts | None,
) -> Part:
    assert shares.groups is not None
    sizes = attention.head_parameters, attention.group_parameters
    return Part(
        block=(stack.name, block.index),
        kind=kind,
        units=attention.heads,
        ways=attention_ways(shares.units, shares.groups, *sizes, counts),
        key=config_key(stack, attention),
        tied=(stack.name, kind) if attention.spec.tied else None,
    )
