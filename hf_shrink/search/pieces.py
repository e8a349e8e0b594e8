"""What can be decided about a model: pieces (matrices that share a scheme) of the parts of its blocks."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from hf_shrink.architectures.absent import PARTS
from hf_shrink.architectures.binding import Binding
from hf_shrink.architectures.bound import BoundAttention, BoundBlock, BoundMlp, BoundStack

Key = tuple[str, int]  # name of a stack, index of a block
WRITERS = ("query", "key", "value", "gate", "up")
EXPERTS = ("experts in", "experts out")


@dataclass(frozen=True)
class Piece:
    """Matrices of a block that share a scheme.

    Attributes:
        name: such as "model.layers.3 mlp in".
        kind: such as "mlp in": pieces of one kind are calibrated together.
        part: "attention", "cross_attention" or "mlp"; None of matrices without a role, and of experts.
        modules: the matrices by path.
    """

    name: str
    kind: str
    key: Key
    part: str | None
    modules: dict[str, nn.Module]

    @property
    def routed(self) -> bool:
        """Whether tokens come to its matrices only where a router sends them: those of a mixture's experts."""
        return self.kind in EXPERTS


def find_pieces(binding: Binding, quantizable: Collection[str]) -> tuple[Piece, ...]:
    """All pieces of the blocks: what writes the units of a part, what reads them, and what has no role.

    The gates and ups of all experts of a block are one piece, their downs another: experts have to be taken apart.

    Args:
        quantizable: paths of the matrices that may be quantized; pieces have only these.
    """
    return tuple(
        piece for stack in binding.stacks for block in stack.blocks for piece in _of(stack, block, quantizable)
    )


def _of(stack: BoundStack, block: BoundBlock, quantizable: Collection[str]) -> list[Piece]:
    pieces: list[Piece] = []
    taken: set[str] = set()
    for kind in EXPERTS if block.experts is not None else ():
        assert block.experts is not None and block.experts.separate
        roles = block.experts.matrices
        own = [path for path, role in roles.items() if path in quantizable and (role == "down") == (kind == EXPERTS[1])]
        taken |= set(own)
        if own:
            modules = {path: block.module.get_submodule(path.removeprefix(block.path + ".")) for path in own}
            pieces.append(Piece(f"{block.path} {kind}", kind, (stack.name, block.index), None, modules))
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
