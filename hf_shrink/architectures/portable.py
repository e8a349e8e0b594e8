"""Which sizes a stock config can say: asked of the config itself, by setting them on a copy and validating that."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig

from hf_shrink.architectures.base import Attention, Mlp, Stack
from hf_shrink.architectures.bound import BoundAttention, BoundMlp

Keys = dict[str, int]


def stack_config(config: PretrainedConfig, spec: Stack) -> PretrainedConfig:
    """The config with a stack's keys: the model's own, or a part of it. A tower alone has no such part."""
    for part in spec.config.split(".") if spec.config else ():
        config = getattr(config, part, config)
    return config


def stock_accepts(config: PretrainedConfig, keys: Mapping[str, int]) -> bool:
    """Whether the config is still valid with `keys` set."""
    changed = copy.deepcopy(config)
    for key, value in keys.items():
        setattr(changed, key, value)
    try:
        changed.validate()
    except (StrictDataclassError, ValueError):
        return False
    return True


def attention_keys(spec: Attention, config: PretrainedConfig, heads: int, kv_heads: int, head_size: int) -> Keys | None:
    """The config keys that make stock transformers build such an attention; None when it cannot."""
    if spec.head_size_key is None or (spec.kv_heads is None and kv_heads != heads):
        return None
    keys = {spec.heads: heads, spec.head_size_key: head_size}
    if spec.kv_heads is not None:
        keys[spec.kv_heads] = kv_heads
    return keys if stock_accepts(config, keys) else None


def mlp_keys(spec: Mlp, config: PretrainedConfig, channels: int) -> Keys | None:
    """The config keys that make stock transformers build such an MLP; None when it cannot."""
    if spec.channels is None:
        return None
    keys = {spec.channels: channels}
    return keys if stock_accepts(config, keys) else None


def part_keys(part: BoundAttention | BoundMlp, config: PretrainedConfig) -> Keys | None:
    """The config keys for the part's present sizes; None when stock cannot say them."""
    if isinstance(part, BoundMlp):
        return mlp_keys(part.spec, config, part.channels)
    return attention_keys(part.spec, config, part.heads, part.kv_heads, part.head_size)


def portable_head_counts(attention: BoundAttention, config: PretrainedConfig) -> Iterator[tuple[int, int]]:
    """(KV groups, query heads in each) that stock can build when every block has them, the present sizes first."""
    yield attention.kv_heads, attention.heads_per_group
    if attention.spec.fixed is not None:
        return
    for groups in range(attention.kv_heads, 0, -1):
        for each in range(attention.heads_per_group, 0, -1):
            heads = groups * each
            if heads != attention.heads and attention_keys(attention.spec, config, heads, groups, attention.head_size):
                yield groups, each
