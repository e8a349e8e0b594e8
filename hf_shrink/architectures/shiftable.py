"""Norms whose outputs can have a constant taken off each channel, with biases behind them that put it back."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from hf_shrink.architectures.bound import BoundAttention, BoundBlock, BoundMlp, BoundStack
from hf_shrink.architectures.feeds import NormSource, find_feeds
from hf_shrink.architectures.linears import bias_of

ELSEWHERE = "what they read also goes where no bias can put a constant back"
NO_BIAS = "the norm in front of them or one of them has no bias"


@dataclass(frozen=True)
class Shiftable:
    """A norm with a bias, and what reads it.

    Attributes:
        readers: paths of the matrices, all with a bias.
        carrier: path of the matrix with a bias that is added to the norm's output as the residual; None where that is
            not the residual stream.
    """

    norm: str
    readers: tuple[str, ...]
    carrier: str | None = None


@dataclass
class Shiftables:
    """Of a stack: what was found, and the roles that were not, with the reason and in how many blocks."""

    found: list[Shiftable] = field(default_factory=list)
    refused: Counter[tuple[str, str]] = field(default_factory=Counter)


def find_shiftable(model: nn.Module, stack: BoundStack) -> Shiftables:
    """The norms of a stack's blocks, dense, that can be shifted."""
    result = Shiftables()
    before: str | None = None
    for block in stack.blocks:
        if stack.spec is None or stack.spec.found or block.experts is not None:
            result.refused["all", ELSEWHERE] += 1
            continue
        for what, candidate in _of_block(model, block, stack, before):
            if candidate is None:
                result.refused[what, ELSEWHERE] += 1
            elif not _has_biases(model, candidate):
                result.refused[what, NO_BIAS] += 1
            else:
                result.found.append(candidate)
        before = _behind(block, block.mlp)
    return result


def _of_block(
    model: nn.Module, block: BoundBlock, stack: BoundStack, before: str | None
) -> list[tuple[str, Shiftable | None]]:
    """What feeds the attention and the MLP of a block. `before`: the norm behind the block in front of it."""
    feeds = find_feeds(block, stack.spec, model.config)  # type: ignore[arg-type]
    in_front = [Shiftable(f.source.path, f.readers) for f in feeds.found if isinstance(f.source, NormSource)]
    if in_front:
        return [("the matrices behind norms", shiftable) for shiftable in in_front]
    if block.attention is None or block.mlp is None or block.cross_attention is not None:
        return [("all", None)]
    between = _behind(block, block.attention)
    roles = ("up",) if block.mlp.spec.gate is None else ("gate", "up")
    return [
        ("query, key, value", _reading(before, block.attention, ("query", "key", "value"), "output")),
        (", ".join(roles), _reading(between, block.mlp, roles, "down")),
    ]


def _reading(
    norm: str | None, part: BoundAttention | BoundMlp, roles: tuple[str, ...], carrier: str
) -> Shiftable | None:
    if norm is None:
        return None
    return Shiftable(norm, tuple(dict.fromkeys(part.slot(role).path for role in roles)), part.slot(carrier).path)


def _behind(block: BoundBlock, part: BoundAttention | BoundMlp | None) -> str | None:
    path = None if part is None else part.spec.norm_behind
    return None if path is None else f"{block.path}.{path}"


def _has_biases(model: nn.Module, shiftable: Shiftable) -> bool:
    matrices = [*shiftable.readers, *([] if shiftable.carrier is None else [shiftable.carrier])]
    norm = model.get_submodule(shiftable.norm)
    biases = [getattr(norm, "bias", None), *(bias_of(model.get_submodule(path)) for path in matrices)]
    return all(bias is not None for bias in biases)
