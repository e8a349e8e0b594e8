"""What can be decided about a model: pieces (matrices that share a scheme) of the parts of its blocks."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from hf_shrink.architectures.absent import PARTS
from hf_shrink.architectures.binding import Binding
from hf_shrink.architectures.bound import BoundAttention, BoundBlock, BoundMlp, BoundStack
from hf_shrink.errors import ArchitectureError

Key = tuple[str, int]  # name of a stack, index of a block
WRITERS = ("query", "key", "value", "gate", "up")


@dataclass(frozen=True)
class Piece:
    """Matrices of a block that share a scheme.

    Attributes:
        name: such as "model.layers.3 mlp in".
        kind: such as "mlp in": pieces of one kind are calibrated together.
        part: "attention", "cross_attention" or "mlp"; None of matrices without a role.
        modules: the matrices by path.
    """

    name: str
    kind: str
    key: Key
    part: str | None
    modules: dict[str, nn.Module]


def find_pieces(binding: Binding, quantizable: Collection[str]) -> tuple[Piece, ...]:
    """All pieces of the blocks: what writes the units of a part, what reads them, and what has no role.

    Args:
        quantizable: paths of the matrices that may be quantized; pieces have only these.

    Raises:
        ArchitectureError: a block is a mixture of experts.
    """
    return tuple(
        piece for stack in binding.stacks for block in stack.blocks for piece in _of(stack, block, quantizable)
    )


def _of(stack: BoundStack, block: BoundBlock, quantizable: Collection[str]) -> list[Piece]:
    if block.experts is not None:
        raise ArchitectureError(
            f"{block.path} is a mixture of experts, which a budget cannot be spent on yet; give the recipe steps, "
            "such as prune: {what: experts} and quantize"
        )
    pieces: list[Piece] = []
    taken: set[str] = set()
    for name in PARTS:
        part: BoundAttention | BoundMlp | None = getattr(block, name)
        for side, writes in (("in", True), ("out", False)) if part is not None else ():
            assert part is not None
            paths = dict.fromkeys(slot.path for slot in part.slots if (slot.role in WRITERS) == writes)
            found = {path: part.modules[path] for path in paths if path in quantizable and path not in taken}
            taken |= found.keys()
            if found:
                pieces.append(
                    Piece(f"{block.path} {name} {side}", f"{name} {side}", (stack.name, block.index), name, found)
                )
    others = [path for path in block.roles if path in quantizable and path not in taken]
    if others:
        modules = {path: block.module.get_submodule(path.removeprefix(block.path + ".")) for path in others}
        pieces.append(Piece(f"{block.path} others", "others", (stack.name, block.index), None, modules))
    return pieces
