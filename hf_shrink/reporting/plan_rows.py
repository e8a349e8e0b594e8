"""What a plan does to each block, as figures: bits, heads, channels, what goes, and the damage that was predicted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hf_shrink.plan import BlockPlan, Plan
from hf_shrink.reporting.layout import BlockLayout, row_name

MIXED = "/"  # between the bits of what writes a part's units and of what reads them
# What is counted of a block: its name, and the part that it belongs to.
UNITS = {
    "groups": ("KV groups", "attention"),
    "heads": ("query heads", "attention"),
    "cross_heads": ("cross heads", "cross_attention"),
    "channels": ("channels", "mlp"),
    "experts": ("experts", "experts"),
    "expert_channels": ("channels of each expert", "experts"),
}


@dataclass(frozen=True)
class Share:
    """How many of something are kept."""

    kept: int
    total: int

    def __str__(self) -> str:
        return str(self.kept) if self.kept == self.total else f"{self.kept} of {self.total}"

    @property
    def part(self) -> float:
        """0 to 1."""
        return self.kept / self.total


@dataclass(frozen=True)
class PlanRow:
    """One block.

    Attributes:
        stack, block: name of the stack, index of the block in the source.
        bits: by part ("attention", "cross_attention", "mlp", "experts", "others"), the bits of its matrices, in the
            order in which they run, each number once; None stands for dense. Absent: the block has no such part.
        roles: the same by role ("query", "cross query", "expert up"), with the part that the role is in.
        units: kept of each kind of unit that the block has, see `UNITS`.
        removed: parts that go; ("block",): all of it.
        damage: predicted, nats a prediction; None: nothing was predicted.
    """

    stack: str
    block: int
    bits: dict[str, tuple[int | None, ...]]
    roles: dict[str, tuple[str, tuple[int | None, ...]]]
    units: dict[str, Share]
    removed: tuple[str, ...]
    damage: float | None

    def without(self, part: str) -> bool:
        """Whether a part goes, or all of the block."""
        return part in self.removed or "block" in self.removed

    def said_bits(self, part: str) -> str:
        """For people: "4", "4/3", "dense"; "-" where the part goes or was never there."""
        return "-" if self.without(part) or part not in self.bits else said(self.bits[part])


def said(bits: Iterable[int | None]) -> str:
    """Bits for people: "4", "4/3", "dense"."""
    return MIXED.join("dense" if found is None else str(found) for found in bits)


def plan_rows(plan: Plan, layout: Sequence[BlockLayout]) -> list[PlanRow]:
    """A row for every block of the source, in order. `layout`: of the dense model."""
    bits = plan.bits
    return [_row(plan, block, bits) for block in layout]


def outside_rows(plan: Plan, layout: Sequence[BlockLayout]) -> list[tuple[str, int, float | None]]:
    """What is quantized outside the blocks: path, bits, and the predicted damage."""
    inside = tuple(block.path + "." for block in layout)
    return [(path, bits, damage_of(plan, path)) for path, bits in plan.bits.items() if not path.startswith(inside)]


def damage_of(plan: Plan, path: str) -> float | None:
    """What was predicted for a block or a module: entries are named by its path, and what is done there."""
    found = [value for name, value in plan.damage.items() if name == path or name.startswith((path + " ", path + ":"))]
    return sum(found) if found else None


def _row(plan: Plan, block: BlockLayout, all_bits: Mapping[str, int]) -> PlanRow:
    own, kept = BlockPlan(), True
    if block.stack in plan.stacks:
        stack = plan.stacks[block.stack]
        own, kept = stack.blocks.get(block.block, own), block.block in stack.kept
    known = {path: bits for path, bits in all_bits.items() if path.startswith(block.path + ".")}
    parts: dict[str, tuple[int | None, ...]] = {}
    roles: dict[str, tuple[str, tuple[int | None, ...]]] = {}
    for part, names in block.parts.items():
        every: list[int | None] = []
        for role in names:
            bits = [None if path is None else known[path] for path in block.matches(part, role, known)]
            roles[row_name(part, role)] = part, _each_once(bits)
            every += bits
        parts[part] = _each_once(every)
    return PlanRow(
        stack=block.stack,
        block=block.block,
        bits=parts,
        roles=roles,
        units=_units(own, block),
        removed=(own.removed or ()) if kept else ("block",),
        damage=damage_of(plan, block.path),
    )


def _units(own: BlockPlan, block: BlockLayout) -> dict[str, Share]:
    sizes = block.sizes
    kept = {"heads": own.query_heads, "cross_heads": own.cross_heads, "channels": own.channels, "experts": own.experts}
    kept["expert_channels"] = None if own.expert_channels is None else own.expert_channels[0]
    found = {
        name: Share(sizes[name] if units is None else len(units), sizes[name])
        for name, units in kept.items()
        if name in sizes
    }
    if "groups" in sizes:
        heads = range(sizes["heads"]) if own.query_heads is None else own.query_heads
        left = {head // (sizes["heads"] // sizes["groups"]) for head in heads}
        found = {"groups": Share(len(left), sizes["groups"]), **found}
    return found


def _each_once(bits: Iterable[int | None]) -> tuple[int | None, ...]:
    return tuple(dict.fromkeys(bits))
