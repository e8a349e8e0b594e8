"""What feeds a block's matrices, and whether a scale of each input channel can be moved into it without any change."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from hf_shrink.architectures.base import Stack
from hf_shrink.architectures.bound import BoundAttention, BoundBlock, BoundMlp
from hf_shrink.architectures.portable import stack_config

# f(s x) = s f(x) for every s > 0.
HOMOGENEOUS = ("relu", "leaky_relu", "linear")
NO_NORM = "no norm in front of them feeds nothing else"


@dataclass(frozen=True)
class NormSource:
    """A norm: its weight is what it stores plus `offset`; a bias, if any, is added after it."""

    path: str
    offset: float


@dataclass(frozen=True)
class RowSource:
    """Rows of a matrix: row `rows[u]`, with its bias, writes unit u. `rows`: int64 (units,)."""

    path: str
    rows: Tensor


@dataclass(frozen=True)
class Feed:
    """Matrices that read what one source writes, and nobody else does.

    Dividing unit u at the source by a positive number and multiplying the readers' columns of that unit by it changes
    no output of the model.

    Attributes:
        readers: paths of the matrices.
        unit: int64 (in,), the unit of every input column of the readers.
    """

    source: NormSource | RowSource
    readers: tuple[str, ...]
    unit: Tensor

    @property
    def units(self) -> int:
        return int(self.unit.max()) + 1


@dataclass(frozen=True)
class Feeds:
    """A block's feeds, and the roles whose inputs cannot be scaled, each with the reason."""

    found: tuple[Feed, ...]
    refused: tuple[tuple[str, str], ...]


def find_feeds(block: BoundBlock, spec: Stack | None, config: PretrainedConfig) -> Feeds:
    """Every feed of a block whose matrices are still dense.

    Args:
        spec: the block's stack; None for a tower and a family without a role table, where nothing is found.
        config: the model's.
    """
    if spec is None or spec.found:
        return Feeds((), (("all", f"the table of model type {config.model_type!r} has no roles for them"),))
    found: list[Feed] = []
    refused: list[tuple[str, str]] = []
    wanted: list[tuple[str, str | tuple[str, ...] | None, BoundAttention | BoundMlp, tuple[str, ...]]] = []
    if block.attention is not None:
        wanted.append(("query, key, value", block.attention.spec.norm, block.attention, ("query", "key", "value")))
    if block.cross_attention is not None:
        wanted.append(
            ("query of the cross attention", block.cross_attention.spec.norm, block.cross_attention, ("query",))
        )
        refused.append(("key and value of the cross attention", "every block reads the same encoder output"))
    if block.mlp is not None:
        into: tuple[str, ...] = ("up",) if block.mlp.spec.gate is None else ("gate", "up")
        norm = block.mlp.spec.norm if block.experts is None else None  # it feeds the experts and their router too
        wanted.append((", ".join(into), norm, block.mlp, into))
    readers: dict[str, list[str]] = {}
    for what, norms, part, roles in wanted:
        path = _first(block, norms)
        if path is None:
            refused.append((what, NO_NORM))
        else:  # attention and MLP side by side may read one norm
            readers.setdefault(path, []).extend(part.slot(role).path for role in roles)
    for path, matrices in readers.items():
        width = block.module.get_submodule(path).weight.numel()  # type: ignore[operator]
        source = NormSource(f"{block.path}.{path}", spec.norm_offset)
        found.append(Feed(source, _once(matrices), torch.arange(width)))
    for attention in (block.attention, block.cross_attention):
        if attention is not None and not _clips(stack_config(config, spec)):
            found.append(_value_to_output(attention))
        elif attention is not None:
            refused.append(("output", "values are clipped, at bounds that are the same for every scale"))
    if block.mlp is not None:
        reason = _not_homogeneous(block.mlp, stack_config(config, spec))
        if reason is None:
            found.append(_up_to_down(block.mlp))
        else:
            refused.append(("down", reason))
    if block.experts is not None:
        refused.append(("the experts", "what feeds them also decides which of them a token goes to"))
    elif block.mlp is None:
        refused.append(("the MLP", "its roles are not known"))
    return Feeds(tuple(found), tuple(refused))


def norm_path(block: BoundBlock, part: BoundAttention | BoundMlp) -> str | None:
    """The full path of the norm with a weight that feeds a part of the block; None where there is none."""
    path = _first(block, part.spec.norm)
    return None if path is None else f"{block.path}.{path}"


def _first(block: BoundBlock, norms: str | tuple[str, ...] | None) -> str | None:
    """The first of several paths at which the block has a norm with a weight."""
    present = dict(block.module.named_modules())
    for path in (norms,) if isinstance(norms, str) else norms or ():
        if path in present:
            return path if isinstance(getattr(present[path], "weight", None), nn.Parameter) else None
    return None


def _once(paths: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(paths))


def _value_to_output(attention: BoundAttention) -> Feed:
    """A unit is one position of a value head. All query heads of a KV group read it, so they share its scale."""
    value, output = attention.slot("value"), attention.slot("output")
    units = torch.arange(value.index.numel()).view(attention.kv_heads, attention.head_size)
    unit = torch.empty(output.index.numel(), dtype=torch.long)
    unit[output.index] = units.repeat_interleave(attention.heads_per_group, 0)
    return Feed(RowSource(value.path, value.index.reshape(-1)), (output.path,), unit)


def _up_to_down(mlp: BoundMlp) -> Feed:
    """A unit is a channel. A gate multiplies `up`, so that scales of `up` pass; so they do through a ReLU."""
    up, down = mlp.slot("up"), mlp.slot("down")
    unit = torch.empty(mlp.channels, dtype=torch.long)
    unit[down.index.reshape(-1)] = torch.arange(mlp.channels)
    return Feed(RowSource(up.path, up.index.reshape(-1)), (down.path,), unit)


def _clips(config: PretrainedConfig) -> bool:
    """Whether the attention clips queries, keys and values."""
    owners = (config, getattr(config, "attn_config", None))
    return any(getattr(owner, "clip_qkv", None) for owner in owners)


def _not_homogeneous(mlp: BoundMlp, config: PretrainedConfig) -> str | None:
    if mlp.spec.gate is not None:
        return None
    key = mlp.spec.activation
    name = getattr(config, key, None) if key is not None else None
    if name in HOMOGENEOUS:
        return None
    return f"{name or 'the activation'} between up and down does not pass scales on"
