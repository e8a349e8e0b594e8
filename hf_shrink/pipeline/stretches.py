"""Kept blocks between gaps, and which of them make up together for what is missing behind them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from hf_shrink.architectures.bound import BoundBlock, BoundMlp, BoundStack
from hf_shrink.architectures.linears import matrix
from hf_shrink.plan import BlockPlan, StackPlan

MOST = 3  # blocks that share what one gap leaves to do; a fourth and fifth add little
WIDEST = 10240  # inputs of all of their matrices, which are solved for at once: memory by its square, time by its cube


@dataclass(frozen=True)
class Stretch:
    """Kept blocks in a row.

    Attributes:
        blocks: the row; all of it is whole, but for the last where that lacks parts.
        gap: the removed blocks behind it.
        lacking: whether something is missing at its end: a gap, or parts of the last block.
    """

    blocks: tuple[BoundBlock, ...]
    gap: tuple[BoundBlock, ...]
    lacking: bool

    def team(self, plan: StackPlan) -> tuple[BoundBlock, ...]:
        """The last blocks that make up together for what is missing; at least one where something is."""
        count = int(self.lacking)
        while 0 < count < min(MOST, len(self.blocks)):
            if not narrow(self.blocks[-count - 1 :], plan):
                break
            count += 1
        return self.blocks[len(self.blocks) - count :]


def stretches(stack: BoundStack, plan: StackPlan) -> Iterator[Stretch]:
    """All kept blocks, in order."""
    row: list[BoundBlock] = []
    for place, index in enumerate(plan.kept):
        following = plan.kept[place + 1] if place + 1 < len(plan.kept) else len(stack.blocks)
        gap = tuple(stack.blocks[index + 1 : following])
        row.append(stack.blocks[index])
        if gap or plan.blocks.get(index, BlockPlan()).removed or following == len(stack.blocks):
            yield Stretch(tuple(row), gap, bool(gap or plan.blocks.get(index, BlockPlan()).removed))
            row = []


def narrow(blocks: Sequence[BoundBlock], plan: StackPlan) -> bool:
    """Whether all matrices of these blocks can be solved for at once."""
    return sum(matrix(m).shape[1] for block in blocks for m in writers(block, plan)) <= WIDEST


def writers(block: BoundBlock, plan: StackPlan) -> Sequence[nn.Module]:
    """The matrices of what is left of a block that write the residual stream, in the order in which they run."""
    gone = plan.blocks.get(block.index, BlockPlan()).removed or ()
    found = []
    for name in ("attention", "cross_attention", "mlp"):
        part = getattr(block, name)
        if part is not None and name not in gone:
            found.append(part.modules[part.slot("down" if isinstance(part, BoundMlp) else "output").path])
    return found
