"""What a plan does to each block, as figures: bits, heads, channels, what goes, and the damage that was predicted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hf_shrink.architectures.binding import Binding
from hf_shrink.architectures.bound import BoundAttention, BoundBlock, BoundMlp, BoundStack
from hf_shrink.plan import BlockPlan, Plan

DENSE_BITS = 16
MIXED = "/"  # between the bits of what writes a part's units and of what reads them


@dataclass(frozen=True)
class Share:
    """How many of something are kept."""

    kept: int
    total: int

    def __str__(self) -> str:
        return str(self.kept) if self.kept == self.total else f"{self.kept} of {self.total}"


@dataclass(frozen=True)
class PlanRow:
    """One block.

    Attributes:
        stack, block: name of the stack, index of the block in the source.
        bits: by part ("attention", "cross_attention", "mlp", "experts", "others"), the bits of its matrices, in the
            order in which they run, each number once; None stands for dense. Absent: the block has no such part.
        groups, heads, channels, experts: None: it has none.
        removed: parts that go; ("block",): all of it.
        damage: predicted, nats a prediction; None: nothing was predicted.
    """

    stack: str
    block: int
    bits: dict[str, tuple[int | None, ...]]
    groups: Share | None
    heads: Share | None
    channels: Share | None
    experts: Share | None
    removed: tuple[str, ...]
    damage: float | None

    def said_bits(self, part: str) -> str:
        """For people: "4", "4/3", "dense"; "-" where the part goes or was never there."""
        if part in self.removed or "block" in self.removed or part not in self.bits:
            return "-"
        return MIXED.join("dense" if bits is None else str(bits) for bits in self.bits[part])


def plan_rows(plan: Plan, binding: Binding) -> list[PlanRow]:
    """A row for every block of the source, in order. `binding`: of the dense model."""
    return [_row(plan, stack, block) for stack in binding.stacks for block in stack.blocks]


def outside_rows(plan: Plan, binding: Binding) -> list[tuple[str, int, float | None]]:
    """What is quantized outside the blocks: path, bits, and the predicted damage."""
    inside = tuple(block.path + "." for block in binding.blocks)
    return [(path, bits, _damage(plan, path)) for path, bits in plan.bits.items() if not path.startswith(inside)]


def _row(plan: Plan, stack: BoundStack, block: BoundBlock) -> PlanRow:
    own, kept = BlockPlan(), True
    if stack.name in plan.stacks:
        own, kept = plan.stacks[stack.name].blocks.get(block.index, own), block.index in plan.stacks[stack.name].kept
    attention, mlp, experts = block.attention, block.mlp, block.experts
    groups = heads = channels = None
    if attention is not None:
        query = range(attention.heads) if own.query_heads is None else own.query_heads
        heads, groups = Share(len(query), attention.heads), Share(len(attention.groups_of(query)), attention.kv_heads)
    if mlp is not None:
        channels = Share(mlp.channels if own.channels is None else len(own.channels), mlp.channels)
    return PlanRow(
        stack=stack.name,
        block=block.index,
        bits=_bits(plan, block),
        groups=groups,
        heads=heads,
        channels=channels,
        experts=None if experts is None else Share(len(own.experts or range(experts.count)), experts.count),
        removed=(own.removed or ()) if kept else ("block",),
        damage=_damage(plan, block.path),
    )


def _bits(plan: Plan, block: BoundBlock) -> dict[str, tuple[int | None, ...]]:
    known = plan.bits
    left = dict.fromkeys(path for path, roles in block.roles.items() if path not in block.routers)
    found: dict[str, tuple[int | None, ...]] = {}
    for name in ("attention", "cross_attention", "mlp"):
        part: BoundAttention | BoundMlp | None = getattr(block, name)
        if part is not None:
            paths = [slot.path for slot in part.slots]
            found[name] = _each_once(known.get(path) for path in paths)
            left = {path: None for path in left if path not in paths}
    if block.experts is not None:
        mine = [path for path in (*left, *known) if path.startswith(block.experts.path + ".")]
        found["experts"] = _each_once(known.get(path) for path in mine) if mine else (None,)
        left = {path: None for path in left if path not in mine}
    if left:
        found["others"] = _each_once(known.get(path) for path in left)
    return found


def _each_once(bits: Iterable[int | None]) -> tuple[int | None, ...]:
    return tuple(dict.fromkeys(bits))


def _damage(plan: Plan, path: str) -> float | None:
    """What was predicted for a block or a module: entries are named by its path, and what is done there."""
    found = [value for name, value in plan.damage.items() if name == path or name.startswith((path + " ", path + ":"))]
    return sum(found) if found else None
