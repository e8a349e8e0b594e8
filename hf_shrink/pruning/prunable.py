"""Which kinds of units may go at all: what the family says, what stock transformers can load, what was asked."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from hf_shrink.architectures.base import Attention
from hf_shrink.architectures.binding import Binding
from hf_shrink.architectures.bound import BoundAttention, BoundExperts, BoundMlp, BoundStack
from hf_shrink.architectures.portable import portable_head_counts
from hf_shrink.errors import RecipeError
from hf_shrink.pruning.parts import HEADS, Kind
from hf_shrink.surgery.depth import stack_configs

Unitary = BoundAttention | BoundMlp | BoundExperts  # what has units
HeadCounts = frozenset[tuple[int, int]]  # (KV groups, query heads in each)
REMEDY = "set portable: false"


@dataclass(frozen=True)
class Prunable:
    """What may be removed.

    Attributes:
        kinds: by stack name and kind of unit, the head counts that may be left; None where any count will do.
        notes: why other kinds stay.
    """

    kinds: Mapping[tuple[str, Kind], HeadCounts | None]
    notes: tuple[str, ...]


def find_prunable(
    model: nn.Module, binding: Binding, units: Literal["all", "attention", "mlp"], *, portable: bool
) -> Prunable:
    """Look at every stack. Raises RecipeError when nothing of what was asked can be removed."""
    kinds: dict[tuple[str, Kind], HeadCounts | None] = {}
    keys: dict[tuple[str, Kind], Hashable] = {}
    blocked: set[Hashable] = set()
    notes: list[str] = []
    for stack in binding.stacks:
        for kind in _asked(units):
            parts = [part for block in stack.blocks if (part := getattr(block, kind)) is not None]
            if not parts:
                continue
            keys[stack.name, kind] = config_key(stack, parts[0])
            counts = _portable_counts(model, stack, parts[0]) if portable else None
            reason = _reason_against(stack, parts, counts, portable=portable)
            if reason is None:
                kinds[stack.name, kind] = counts
            else:
                notes.append(f"{stack.name} {kind.replace('_', ' ')} keeps all of its units: {reason}")
                blocked.add(keys[stack.name, kind])
    if portable:  # a config key that one stack cannot change stays for all stacks that read it
        kinds = {name: counts for name, counts in kinds.items() if keys[name] not in blocked}
    if not kinds:
        why = "; ".join(notes) or f"the blocks of this {binding.model_type!r} model have none"
        raise RecipeError(f"no units of kind {units!r} can be removed: {why}")
    return Prunable(kinds, tuple(notes))


def config_key(stack: BoundStack, part: Unitary) -> Hashable:
    """What tells from which place of the config stock transformers reads the number of a part's units."""
    assert stack.spec is not None
    return (stack.spec.config, part.spec.heads if isinstance(part, BoundAttention) else part.spec.channels)


def _asked(units: Literal["all", "attention", "mlp"]) -> tuple[Kind, ...]:
    if units == "mlp":
        return ("mlp", "experts")
    return HEADS if units == "attention" else (*HEADS, "mlp", "experts")


def _portable_counts(model: nn.Module, stack: BoundStack, part: Unitary) -> HeadCounts | None:
    if not isinstance(part, BoundAttention):
        return None
    return frozenset(portable_head_counts(part, stack_configs(model, stack)[0]))


def _reason_against(
    stack: BoundStack, parts: list[Unitary], counts: HeadCounts | None, *, portable: bool
) -> str | None:
    spec = parts[0].spec
    if isinstance(spec, Attention) and spec.fixed is not None:
        return spec.fixed
    if not portable:
        return None
    if isinstance(spec, Attention) and spec.head_size_key is None:
        return (
            "stock transformers derives the head size from the number of heads, so it cannot load fewer; "
            f"{REMEDY} to remove heads"
        )
    if len({config_key(stack, part) for part in parts}) > 1:
        return f"the blocks take their number from several config keys; {REMEDY} to remove them"
    if not isinstance(spec, Attention) and spec.channels is None:
        return f"no config key says their number; {REMEDY} to remove them"
    if counts is not None and len(counts) < 2:
        return f"the config of stock transformers accepts no smaller number of heads; {REMEDY} to remove heads"
    if len({part.sizes for part in parts}) > 1:
        return f"the blocks differ in size already; {REMEDY}"
    return None
