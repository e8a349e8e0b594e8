"""What the blocks of a dense model are made of, as data that a report keeps: a plan alone says only what is left."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hf_shrink.architectures.binding import Binding
from hf_shrink.architectures.bound import BoundAttention, BoundBlock, BoundMlp

# Parts in the order in which they are shown; "others" holds matrices without a role.
PARTS = ("attention", "cross_attention", "mlp", "experts", "others")
_PREFIXES = {"cross_attention": "cross ", "experts": "expert "}
_EACH = "*"  # in a path: every expert


@dataclass(frozen=True)
class BlockLayout:
    """One block of the dense model.

    Attributes:
        stack, block: name of the stack, index of the block.
        path: of the block's module.
        parts: by part (see `PARTS`) and role, the paths of the matrices below the block. Matrices with several roles
            stand under all of them ("query + key + value"); a `*` stands for the number of any expert.
        sizes: how many "heads", "groups", "cross_heads", "channels", "experts" and "expert_channels" it has.
    """

    stack: str
    block: int
    path: str
    parts: Mapping[str, Mapping[str, Sequence[str]]]
    sizes: Mapping[str, int]

    def matches(self, part: str, role: str, paths: Iterable[str]) -> list[str | None]:
        """Those of `paths` that are matrices of a role; None for a matrix that is not among them."""
        found: list[str | None] = []
        for short in self.parts[part][role]:
            path = f"{self.path}.{short}"
            if _EACH not in path:
                found.append(path if path in paths else None)
                continue
            pattern = re.compile(re.escape(path).replace(re.escape(_EACH), r"\d+"))
            found += [p for p in paths if pattern.fullmatch(p)] or [None]
        return found

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def layout_of(binding: Binding) -> list[BlockLayout]:
    """Every block of a dense model's stacks, in order."""
    return [_of(stack.name, block) for stack in binding.stacks for block in stack.blocks]


def row_name(part: str, role: str) -> str:
    """What a role is called where all parts of a block are listed."""
    return _PREFIXES.get(part, "") + role


def _of(stack: str, block: BoundBlock) -> BlockLayout:
    parts: dict[str, dict[str, list[str]]] = {}
    sizes: dict[str, int] = {}
    left = [path for path in block.roles if path not in block.routers]
    for name in ("attention", "cross_attention", "mlp"):
        part: BoundAttention | BoundMlp | None = getattr(block, name)
        if part is None:
            continue
        parts[name] = _by_roles((slot.role, slot.path) for slot in part.slots)
        left = [path for path in left if path not in {slot.path for slot in part.slots}]
        sizes |= _sizes(name, part)
    if block.experts is not None:
        sizes |= {"experts": block.experts.count, "expert_channels": block.experts.channels}
        inside = block.experts.path + "."
        parts["experts"] = {role: [f"{inside}{_EACH}.{name}"] for role, name in block.experts.names.items()}
        left = [path for path in left if not path.startswith(inside)]
    if left:
        parts["others"] = {"others": left}
    below = {
        part: {role: tuple(path.removeprefix(block.path + ".") for path in paths) for role, paths in roles.items()}
        for part, roles in parts.items()
    }
    return BlockLayout(stack, block.index, block.path, below, sizes)


def _by_roles(slots: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    roles: dict[str, list[str]] = {}
    for role, path in slots:
        own = roles.setdefault(path, [])
        if role not in own:
            own.append(role)
    found: dict[str, list[str]] = {}
    for path, own in roles.items():
        found.setdefault(" + ".join(own), []).append(path)
    return found


def _sizes(name: str, part: BoundAttention | BoundMlp) -> dict[str, int]:
    if isinstance(part, BoundMlp):
        return {"channels": part.channels}
    if name == "cross_attention":
        return {"cross_heads": part.heads}
    return {"heads": part.heads, "groups": part.kv_heads}
