"""What depth pruning may take out of a model, numbered: whole blocks, or the attentions and MLPs inside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from hf_shrink.architectures.absent import PARTS, is_absent
from hf_shrink.architectures.binding import Binding
from hf_shrink.architectures.bound import BoundBlock, BoundMlp, BoundStack
from hf_shrink.surgery.depth import layer_types, why_part_stays, writes_cache


@dataclass(frozen=True)
class Item:
    """One thing that can go: a part of a block, or the whole block (`part` is None)."""

    stack: BoundStack
    block: BoundBlock
    part: str | None
    parameters: int

    @property
    def label(self) -> str:
        return self.block.path if self.part is None else f"{self.block.path} {self.part}"


@dataclass(frozen=True)
class Left:
    """What is left of a model.

    Attributes:
        kept: indices of the blocks left, by stack name.
        parts: the parts that are gone from a block left, by stack name and index; blocks that lose none are absent.
    """

    kept: Mapping[str, tuple[int, ...]]
    parts: Mapping[tuple[str, int], tuple[str, ...]]


class Items:
    """Every item of a model.

    Args:
        parts: "blocks", "attention" (to the encoder too), "mlp", or "any": attentions and MLPs.

    Attributes:
        all: the items, in the order of the binding's blocks.
        stacks: of every item, the number of its stack.
        total: parameters of all blocks.
        notes: what never goes, and why.
    """

    def __init__(self, model: nn.Module, binding: Binding, parts: str = "blocks") -> None:
        self._stacks = binding.stacks
        self._types = {stack.name: layer_types(model, stack) for stack in binding.stacks}
        self._cached = {stack.name for stack in binding.stacks if writes_cache(model, stack)}
        self.parts = parts
        self.total = sum(block.parameters for block in binding.blocks)
        self.notes: tuple[str, ...] = tuple(self._reasons())
        found = [(number, item) for number, stack in enumerate(self._stacks) for item in self._of(stack)]
        self.all = tuple(item for _, item in found)
        self.stacks = tuple(number for number, _ in found)

    def _of(self, stack: BoundStack) -> Iterator[Item]:
        for block in stack.blocks:
            if self.parts == "blocks":
                if not stays(stack, block.index):
                    yield Item(stack, block, None, block.parameters)
                continue
            for part in PARTS if self.parts == "any" else _named(self.parts):
                handed_on = stack.spec is not None and stack.spec.first_is_special and block.index == 0
                if why_part_stays(block, part) is None and not (handed_on and part != "mlp"):
                    yield Item(stack, block, part, _parameters(block, part))

    def _reasons(self) -> Iterator[str]:
        for stack in self._stacks:
            if self.parts == "blocks" and stack.spec is not None and stack.spec.depth_fixed is not None:
                yield f"no blocks of {stack.name} are removed: {stack.spec.depth_fixed}"
            for part in () if self.parts == "blocks" else PARTS if self.parts == "any" else _named(self.parts):
                reasons = [why_part_stays(b, part) for b in stack.blocks if getattr(b, part) is not None]
                if reasons and all(reasons):
                    yield f"the {part.replace('_', ' ')} of {stack.name} blocks stays: {reasons[0]}"

    def left(self, removed: Sequence[int]) -> Left:
        """The model without some items. A block that loses all of its parts goes as a whole where blocks may go."""
        gone: dict[tuple[str, int], list[str]] = {}
        kept: dict[str, tuple[int, ...]] = {}
        out = set(removed)
        for number in sorted(out):
            item = self.all[number]
            gone.setdefault((item.stack.name, item.block.index), []).append(item.part or "")
        for stack in self._stacks:
            whole = {b.index for b in stack.blocks if _nothing_left(stack, b, gone.get((stack.name, b.index), []))}
            kept[stack.name] = tuple(b.index for b in stack.blocks if b.index not in whole)
        parts = {key: tuple(names) for key, names in gone.items() if key[1] in kept[key[0]]}
        return Left(kept, parts)

    def allowed(self, removed: Sequence[int]) -> bool:
        """Whether what is left works: a block in every stack, and attention where a KV cache takes its length from.

        transformers asks the first layer for that, and of layers with windows the first of its kind.
        """
        left = self.left(removed)
        return all(left.kept[stack.name] and self._serves_cache(stack, left) for stack in self._stacks)

    def _serves_cache(self, stack: BoundStack, left: Left) -> bool:
        if stack.name not in self._cached:
            return True
        types = self._types[stack.name]
        first = {types[index]: index for index in reversed(left.kept[stack.name])}
        if stack.spec is not None and stack.spec.found and len(first) < len(set(types)):
            return False  # of blocks without a table nobody knows which kind it is that the cache asks
        return all(
            _attends(stack, index) and "attention" not in left.parts.get((stack.name, index), ())
            for index in first.values()
        )


def _named(part: str) -> tuple[str, ...]:
    return ("attention", "cross_attention") if part == "attention" else (part,)


def _attends(stack: BoundStack, index: int) -> bool:
    """Whether a block has its attention. In a stack without a table it may be there without a known form."""
    block, spec = stack.blocks[index], stack.spec
    if spec is not None and spec.found and (spec.attention is None or not is_absent(block.module, spec.attention)):
        return True
    return block.attention is not None


def stays(stack: BoundStack, index: int) -> bool:
    """Whether a block cannot go as a whole, whatever is left of it."""
    spec = stack.spec
    return spec is None or spec.depth_fixed is not None or (spec.first_is_special and index == 0)


def _nothing_left(stack: BoundStack, block: BoundBlock, gone: Sequence[str]) -> bool:
    if "" in gone:
        return True
    had = {part for part in PARTS if getattr(block, part) is not None}
    return bool(had) and had == set(gone) and block.experts is None and not stays(stack, block.index)


def _parameters(block: BoundBlock, part: str) -> int:
    """Parameters that go with a part; the bias of its last matrix stays."""
    bound = getattr(block, part)
    writer = bound.modules[bound.slot("down" if isinstance(bound, BoundMlp) else "output").path]
    modules = [*bound.modules.values(), *([] if isinstance(bound, BoundMlp) else [bound.module])]
    mine = {id(p): p for module in modules for p in module.parameters()}
    mine.pop(id(getattr(writer, "bias", None)), None)
    return sum(p.numel() for p in mine.values())
