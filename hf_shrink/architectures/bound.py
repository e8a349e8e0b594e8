"""A family's declaration resolved on one model: modules, counts, and which rows and columns each unit owns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_shrink.architectures.base import Attention, Experts, Mlp, Quantity, Stack
from hf_shrink.architectures.linears import shape
from hf_shrink.errors import ArchitectureError

# Of channels of experts: transformers multiplies all experts in one call, which takes rows in multiples of 16 bytes.
MULTIPLE = 8
Cuts = dict[tuple[str, str], Tensor]  # (module path, "out" or "in") -> kept positions, ascending


@dataclass(frozen=True)
class Slot:
    """The rows ("out") or columns ("in") of one matrix that belong to each unit.

    Attributes:
        index: int64 (units, positions of a unit).
    """

    role: str
    path: str
    axis: str
    index: Tensor

    def positions(self, units: Sequence[int]) -> Tensor:
        return self.index[torch.as_tensor(units, dtype=torch.long)].reshape(-1)


def merge_cuts(slots: Iterable[tuple[Slot, Sequence[int]]]) -> Cuts:
    """Kept positions per matrix and axis: the ascending union over all roles that share it."""
    parts: dict[tuple[str, str], list[Tensor]] = {}
    for slot, units in slots:
        parts.setdefault((slot.path, slot.axis), []).append(slot.positions(units))
    return {key: torch.cat(value).sort().values for key, value in parts.items()}


def _slot_parameters(slots: Iterable[Slot], modules: dict[str, nn.Module]) -> int:
    """Parameters that one unit owns over all slots (weights and biases)."""
    total = 0
    for slot in slots:
        module = modules[slot.path]
        rows, columns = shape(module)
        width = slot.index.shape[1]
        if slot.axis == "out":
            total += width * (columns + (getattr(module, "bias", None) is not None))
        else:
            total += width * rows
    return total


@dataclass(frozen=True)
class BoundAttention:
    """Attention of one block. `query` and `output` slots count query heads, `key` and `value` KV groups.

    Attributes:
        per_head: parameters with one entry a query head that this block carries, {path below `module`: dimension}.
    """

    spec: Attention
    path: str
    module: nn.Module
    heads: int
    kv_heads: int
    head_size: int
    slots: tuple[Slot, ...]
    modules: dict[str, nn.Module]
    per_head: dict[str, int] = field(default_factory=dict)

    @property
    def heads_per_group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def sizes(self) -> tuple[int, ...]:
        """(query heads, KV groups, head size)."""
        return self.heads, self.kv_heads, self.head_size

    def slot(self, role: str) -> Slot:
        return next(s for s in self.slots if s.role == role)

    def groups_of(self, query_heads: Sequence[int]) -> tuple[int, ...]:
        """KV groups that the kept query heads belong to. Raises ArchitectureError when they keep unequal numbers."""
        counts: dict[int, int] = {}
        for head in query_heads:
            counts[head // self.heads_per_group] = counts.get(head // self.heads_per_group, 0) + 1
        if not counts or len(set(counts.values())) != 1:
            raise ArchitectureError(
                f"{self.path}: a plan must keep the same number of query heads in every KV group that it keeps, "
                f"not {counts or 'none'}"
            )
        return tuple(sorted(counts))

    def cuts(self, query_heads: Sequence[int]) -> Cuts:
        groups = self.groups_of(query_heads)
        units = {"query": query_heads, "output": query_heads, "key": groups, "value": groups}
        return merge_cuts((slot, units[slot.role]) for slot in self.slots)

    def cached(self, heads: int, kv_heads: int) -> int:
        """Numbers that a token takes of the KV cache, with so many query heads and KV groups left."""
        return 2 * (heads if self.spec.caches_heads else kv_heads) * self.head_size

    @property
    def group_parameters(self) -> int:
        """Parameters of one KV group with all of its query heads."""
        return self.head_parameters * self.heads_per_group + _slot_parameters(
            (s for s in self.slots if s.role in ("key", "value")), self.modules
        )

    @property
    def head_parameters(self) -> int:
        """Parameters of one query head (its rows of `query`, its columns of `output`, its position bias)."""
        bias = sum(self.module.get_parameter(path).numel() // self.heads for path in self.per_head)
        return bias + _slot_parameters((s for s in self.slots if s.role in ("query", "output")), self.modules)

    def quantity(self, name: Quantity, heads: int, kv_heads: int) -> int:
        values = {
            "heads": heads,
            "kv_heads": kv_heads,
            "heads_per_group": heads // kv_heads,
            "query_width": heads * self.head_size,
            "kv_width": kv_heads * self.head_size,
        }
        return values[name]


@dataclass(frozen=True)
class BoundMlp:
    """MLP of one block."""

    spec: Mlp
    path: str
    module: nn.Module
    channels: int
    slots: tuple[Slot, ...]
    modules: dict[str, nn.Module]

    @property
    def sizes(self) -> tuple[int, ...]:
        """(channels,)."""
        return (self.channels,)

    def slot(self, role: str) -> Slot:
        return next(s for s in self.slots if s.role == role)

    def cuts(self, channels: Sequence[int]) -> Cuts:
        return merge_cuts((slot, channels) for slot in self.slots)

    @property
    def channel_parameters(self) -> int:
        """Parameters of one channel."""
        return _slot_parameters(self.slots, self.modules)


@dataclass(frozen=True)
class BoundExperts:
    """Experts of one block, in 3D parameters or taken apart into one Linear a matrix.

    Attributes:
        path: of the module.
        separate: whether they are taken apart.
        shapes: (out_features, in_features) of an expert's matrices, by role (gate, up, down).
    """

    spec: Experts
    path: str
    module: nn.Module
    separate: bool
    count: int
    shapes: dict[str, tuple[int, int]]

    @property
    def channels(self) -> int:
        """Of each expert."""
        return self.shapes["down"][1]

    @property
    def sizes(self) -> tuple[int, ...]:
        """(channels,)."""
        return (self.channels,)

    @property
    def channel_parameters(self) -> int:
        """Parameters of one channel of one expert."""
        return sum(rows * columns for rows, columns in self.shapes.values()) // self.channels

    @property
    def names(self) -> dict[str, str]:
        """What an expert's matrices are called, by role."""
        return {"gate": self.spec.gate, "up": self.spec.up, "down": self.spec.down}

    @property
    def matrices(self) -> dict[str, str]:
        """The role of every matrix of every expert, by the path that it has once the experts are taken apart."""
        return {f"{self.path}.{e}.{name}": role for e in range(self.count) for role, name in self.names.items()}


@dataclass(frozen=True)
class BoundBlock:
    """One block. `roles`: for every matrix inside it, by full path, the roles it plays (none: ignored)."""

    path: str
    index: int
    module: nn.Module
    attention: BoundAttention | None
    cross_attention: BoundAttention | None
    mlp: BoundMlp | None
    roles: dict[str, tuple[str, ...]]
    experts: BoundExperts | None = None
    routers: tuple[str, ...] = ()  # full paths

    @property
    def parts(self) -> tuple[BoundAttention | BoundMlp, ...]:
        """The parts that have units, in the order in which a block runs them."""
        return tuple(part for part in (self.attention, self.cross_attention, self.mlp) if part is not None)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert, its entries in the router included; 0 in a block without any."""
        if self.experts is None:
            return 0
        total = sum(rows * columns for rows, columns in self.experts.shapes.values())
        for entry in self.experts.spec.entries:
            owner, _, name = entry.rpartition(".")
            parameter = getattr(self.module.get_submodule(owner), name, None)
            if isinstance(parameter, nn.Parameter):
                total += parameter.numel() // self.experts.count
        return total


@dataclass(frozen=True)
class BoundStack:
    """One row of blocks. `spec` is None for a family that is not in the table."""

    name: str
    path: str
    blocks: tuple[BoundBlock, ...]
    spec: Stack | None

    @property
    def parameters(self) -> int:
        return sum(block.parameters for block in self.blocks)
