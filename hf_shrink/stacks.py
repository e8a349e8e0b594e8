"""What is kept of stacks and their blocks, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from hf_shrink.errors import RecipeError
from hf_shrink.ranges import are_numbers, from_ranges, to_ranges


@dataclass(frozen=True)
class BlockPlan:
    """What is kept of one block. None means everything.

    Attributes:
        query_heads: kept query heads, ascending, as numbered in the source; the same number from every KV group kept.
        channels: kept MLP channels, ascending.
        cross_heads: as query_heads, of the attention to the encoder.
        experts: kept experts, ascending.
        merges: what removed experts leave behind: (removed expert, kept expert, share), the share that the removed
            one's weights have in the kept one's new weights. None: nothing is left of them.
        expert_channels: kept channels of each expert, ascending, as many of all of them, a multiple of 8; for every
            expert of the source, in its order, also where some of them go.
        removed: the parts that go as a whole, of "attention", "cross_attention" and "mlp".
    """

    query_heads: tuple[int, ...] | None = None
    channels: tuple[int, ...] | None = None
    cross_heads: tuple[int, ...] | None = None
    experts: tuple[int, ...] | None = None
    merges: tuple[tuple[int, int, float], ...] | None = None
    removed: tuple[str, ...] | None = None
    expert_channels: tuple[tuple[int, ...], ...] | None = None

    @property
    def keeps_all(self) -> bool:
        return all(getattr(self, field.name) is None for field in fields(self))

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without what keeps everything; kept units as text ("0-2,5"): a mixture has millions."""
        found = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        for name in _UNITS & found.keys():
            found[name] = to_ranges(found[name])
        if self.expert_channels is not None:
            found["expert_channels"] = [to_ranges(channels) for channels in self.expert_channels]
        return found

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BlockPlan:
        """From decoded JSON; kept units may also be lists of numbers.

        Raises RecipeError where something is not of its kind, TypeError at a key that is unknown.
        """
        found = {key: _tuples(value) for key, value in data.items()}
        for name in _UNITS & found.keys():
            found[name] = _numbers(found[name], name)
        if found.get("expert_channels") is not None:
            _check_list(found["expert_channels"], "expert_channels", str | tuple)
            found["expert_channels"] = tuple(_numbers(c, "expert_channels") for c in found["expert_channels"])
        if found.get("removed") is not None:
            _check_list(found["removed"], "removed", str)
        for merge in found.get("merges") or ():
            _check_list(merge, "merges", int | float)
            if len(merge) != 3 or not are_numbers(merge[:2]):
                raise RecipeError(f"merges are (removed expert, kept expert, share), not {merge!r}")
        return cls(**found)

    def summary(self) -> str:
        """How much is kept, such as "query heads 6, channels all, without its mlp"."""
        heads, channels = ("all" if kept is None else len(kept) for kept in (self.query_heads, self.channels))
        words = [f"query heads {heads}", f"channels {channels}"]
        if self.experts is not None:
            merged = f" ({len(self.merges)} merged into them)" if self.merges else ""
            words.append(f"experts {len(self.experts)}{merged}")
        if self.expert_channels is not None:
            words.append(f"channels of each expert {len(self.expert_channels[0])}")
        if self.removed:
            words.append(f"without its {' and '.join(self.removed)}".replace("_", " "))
        return ", ".join(words)


_UNITS = frozenset({"query_heads", "channels", "cross_heads", "experts"})


@dataclass(frozen=True)
class StackPlan:
    """What is kept of one stack.

    Attributes:
        kept: indices of the kept blocks in the source, ascending.
        blocks: by source index; a block without an entry keeps everything.
    """

    kept: tuple[int, ...]
    blocks: Mapping[int, BlockPlan] = field(default_factory=dict)

    @property
    def cuts_experts(self) -> bool:
        return any(block.expert_channels is not None for block in self.blocks.values())

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"kept": to_ranges(self.kept), "blocks": {i: block.to_dict() for i, block in self.blocks.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StackPlan:
        """From decoded JSON. Raises RecipeError, KeyError, TypeError or AttributeError where it is none."""
        kept = _numbers(_tuples(data["kept"]), "kept")
        if kept is None:
            raise TypeError("a stack's kept blocks are missing")
        for index in data["blocks"]:
            if not str(index).isdecimal():
                raise RecipeError(f"blocks are named by their numbers in the source, not {index!r}")
        return cls(kept, {int(index): BlockPlan.from_dict(block) for index, block in data["blocks"].items()})

    def summary(self, name: str) -> list[str]:
        """One line, and one for each block that loses something."""
        lines = [f"{name}: {len(self.kept)} blocks kept ({to_ranges(self.kept, ', ')})"]
        for index in self.kept:
            block = self.blocks.get(index)
            if block is not None and not block.keeps_all:
                lines.append(f"  block {index}: {block.summary()}")
        return lines


def _numbers(said: Any, where: str) -> tuple[int, ...] | None:
    if said is None or isinstance(said, str):
        return None if said is None else from_ranges(said)
    _check_list(said, where, int)
    if not are_numbers(said):
        raise RecipeError(f"{where} are whole numbers, or such as '0-2,5'")
    return tuple(said)


def _check_list(said: Any, where: str, kind: Any) -> None:
    """Raises RecipeError unless it is a list of values of a kind, by now a tuple."""
    if not isinstance(said, tuple) or not all(isinstance(value, kind) for value in said):
        raise RecipeError(f"{where} cannot be {str(said)[:60]}; see what `hf-shrink plan --json` writes")


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
