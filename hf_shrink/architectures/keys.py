"""Which config keys say a stack's sizes: asked of its class, by looking at what it builds with another value."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PretrainedConfig

from hf_shrink.architectures.base import Attention, Mlp, Stack
from hf_shrink.architectures.bound import BoundAttention, BoundMlp
from hf_shrink.architectures.declared import bind_stack
from hf_shrink.architectures.portable import part_keys, stack_config
from hf_shrink.architectures.probe import outputs
from hf_shrink.architectures.verify import Part, Probe, check_removal, cut_model, parts_of, same_as_stock

_DEPTHS = re.compile(r"layer|depth|block")
_LISTS = re.compile(r"layer|block|type|rope|pattern")
_CHANNELS = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "hidden_dim", "mlp_dim")
_HEAD_SIZES = ("head_dim", "attention_head_size", "d_kv", "kv_channels", "head_size")


def with_channels(probe: Probe, spec: Stack, bound: Sequence[Part]) -> Stack:
    """`spec` with the config key of its MLP's channels, where there is one."""
    assert isinstance(spec.mlp, Mlp)
    config = stack_config(probe.model.config, spec)
    part = bound[0]
    assert isinstance(part, BoundMlp)
    for key in _holding(config, part.channels, _CHANNELS):
        found = dataclasses.replace(spec, mlp=dataclasses.replace(spec.mlp, channels=key))
        if _stock_builds(probe, found, "mlp", lambda p, _: range(p.channels - 8)):
            return found
    return spec


def with_heads(probe: Probe, spec: Stack, name: str, bound: Sequence[Part]) -> Stack:
    """`spec` with the config keys of an attention's heads, where fewer of them can be said."""
    attention: Attention | None = getattr(spec, name)
    part = bound[0]
    assert attention is not None and isinstance(part, BoundAttention)
    config = stack_config(probe.model.config, spec)
    groups, each = (part.kv_heads // 2, part.heads_per_group) if part.kv_heads > 1 else (1, part.heads_per_group // 2)
    if not groups * each:
        return spec
    kept = [g * part.heads_per_group + h for g in range(groups) for h in range(each)]
    grouped = [key for key in _holding(config, part.kv_heads, ()) if "head" in key and ("kv" in key or "key" in key)]
    for heads in (key for key in _holding(config, part.heads, ()) if "head" in key and key not in grouped):
        for kv_heads in (*grouped, None):
            for size in _HEAD_SIZES:
                form = dataclasses.replace(attention, heads=heads, kv_heads=kv_heads, head_size_key=size)
                found = dataclasses.replace(spec, **{name: form})  # type: ignore[arg-type]
                if _stock_builds(probe, found, name, lambda *_: kept):
                    return found
    return spec


def _stock_builds(probe: Probe, spec: Stack, name: str, keep: Any) -> bool:
    """Whether the stock class, with the keys that `spec` names, is the model cut alike in all blocks."""
    smaller = cut_model(probe.model, spec, name, keep)
    stack = bind_stack(smaller, spec)
    assert stack is not None
    bound = [part for _, part in parts_of(stack, name)]
    config = copy.deepcopy(probe.model.config)
    own = stack_config(config, spec)
    keys = part_keys(bound[0], own)
    if keys is None:
        return False
    for key, value in keys.items():
        setattr(own, key, value)
    return same_as_stock(probe, smaller.state_dict(), config, outputs(smaller, probe.inputs), name) is None


def depth_forms(config: PretrainedConfig, spec: Stack, blocks: int) -> Iterator[Stack]:
    """`spec` with every key that may say its number of blocks, and the lists with one entry a block."""
    lists = [k for k, v in vars(config).items() if isinstance(v, list | tuple) and len(v) == blocks and k[0] != "_"]
    named = tuple(key for key in lists if _LISTS.search(key))
    for key in _holding(config, blocks, ()):
        if not _DEPTHS.search(key):
            continue
        for chosen in dict.fromkeys((named, tuple(lists), ())):
            yield dataclasses.replace(spec, depth=key, block_lists=chosen)


def with_depth(probe: Probe, spec: Stack, blocks: int) -> Stack:
    """`spec` with the config key of its number of blocks, or the reason why none can be removed."""
    if blocks < 2:
        return dataclasses.replace(spec, depth_fixed="there is only one block, which may run several times")
    reason = "no config key says how many blocks there are"
    for form in depth_forms(stack_config(probe.model.config, spec), spec, blocks):
        inner = {*(() if blocks < 3 else ((1,),)), (blocks - 1,), tuple(range(1, blocks, 2))}
        found = next((r for gone in sorted(inner) if (r := check_removal(probe, form, gone)) is not None), None)
        if found is not None:
            reason = found if "no key" not in found else reason
            continue
        first = check_removal(probe, form, (0,))
        return dataclasses.replace(form, first_is_special=first is not None)
    return dataclasses.replace(spec, depth_fixed=reason)


def _holding(config: PretrainedConfig, value: int, unset: Sequence[str]) -> Iterator[str]:
    """Keys with this value, and those of `unset` that hold None."""
    for key, held in vars(config).items():
        if key.startswith("_") or isinstance(held, bool):
            continue
        if (held is None and key in unset) or (isinstance(held, int) and held == value):
            yield key
