"""A narrow copy of a config: the same blocks, in the same number and order, each of a few dozen channels.

What decides how a model computes (layer types, activations, flags, numbers of blocks) stays; what only says how wide it
is becomes small. Equal widths stay equal, whatever keys hold them, so that parts still fit together.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

from transformers import PretrainedConfig

HEADS, HEAD_SIZE = 4, 16
HIDDEN, CHANNELS, VOCABULARY, POSITIONS = HEADS * HEAD_SIZE, 96, 128, 128

_HIDDEN = ("hidden_size", "d_model", "n_embd", "embed_dim", "hidden_dim", "dim", "encoder_hidden_size")
_HEADS = ("num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads", "attention_heads")
_CHANNELS = (
    *("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "mlp_dim"),
    *("ffn_hidden_size", "dense_intermediate_size", "intermediate_size_mlp", "feed_forward_hidden_size"),
)
# What a key ends in, and the largest value that it may keep.
_LIMITS = (
    (r"(^|_)(num|n)(_\w+)?_experts$|^moe_num_experts$|^num_local_experts$", 4),
    (r"num_experts_per_tok|moe_k$|top_?k$|moe_topk|num_selected_experts|experts_top_k|topk_group|n_group$", 2),
    (r"moe_intermediate_size|expert_ffn_hidden_size|expert_hidden_size|shared_expert_intermediate_size", 48),
    (r"shared_intermediate_size|hidden_size_per_layer_input|expert_ffn", 48),
    (r"q_lora_rank|o_lora_rank", 24),
    (r"kv_lora_rank", 16),
    (r"qk_nope_head_dim|v_head_dim|linear_key_head_dim|linear_value_head_dim|index_head_dim|swa_head_dim|d_kv$", 16),
    (r"qk_rope_head_dim", 8),
    (r"global_head_dim|d_head$|head_size$|dim_head|kv_channels|attention_head_size$|size_per_head|attention_key", 16),
    (r"max_(source|target)_positions|max_\w*position_embeddings|n_positions|max_seq_len|seq_length|n_ctx", POSITIONS),
    (r"num_buckets|max_distance|position_buckets", 16),
    (r"num_mel_bins|feature_projection_input_dim", 16),
    (r"ssm_state_size|mamba_d_state|state_size|d_state", 8),
    (r"chunk_size$|block_size$|chunk_length$", 8),
    (r"codebook_size|num_embeddings$|type_vocab_size|num_codevectors_per_group", 32),
)
_TOKEN = re.compile(r"_token_(id|index)s?$|^(pad|bos|eos|cls|sep|mask|unk)_(id|index)$")


def shrunken(config: PretrainedConfig) -> PretrainedConfig:
    """A narrow config of the same class. The given one stays as it is; nothing is promised about its validity."""
    small = copy.deepcopy(config)
    for key in ("quantization_config", "hf_shrink"):
        vars(small).pop(key, None)
    parts = list(_parts(small))
    widths: dict[int, int] = {}
    for part in parts:
        widths |= {v: CHANNELS for key in _CHANNELS if _wide(v := _value(part, key))}
    for part in parts:
        widths |= {v: HIDDEN for key in _HIDDEN if _wide(v := _value(part, key))}
    for part in parts:
        _narrow(part, widths)
    return small


def rebuilt(config: PretrainedConfig) -> PretrainedConfig:
    """The config as it is after it was saved and loaded."""
    again: PretrainedConfig = type(config).from_dict(config.to_dict())
    again._attn_implementation = "eager"
    return again


def _parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PretrainedConfig):
            yield from _parts(value)


def _value(config: PretrainedConfig, key: str) -> Any:
    return vars(config).get(key)


def _wide(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 32


def _narrow(config: PretrainedConfig, widths: dict[int, int]) -> None:
    heads = next((v for key in _HEADS if isinstance(v := _value(config, key), int)), None)
    hidden = next((v for key in _HIDDEN if isinstance(v := _value(config, key), int)), None)
    kv = _value(config, "num_key_value_heads") or _value(config, "num_kv_heads")
    tokens: dict[int, int] = {}
    for key, value in list(vars(config).items()):
        if key.startswith("_") or isinstance(value, bool):
            continue
        if _TOKEN.search(key):
            setattr(config, key, _small_token(value, tokens))
        elif key.endswith("vocab_size") and isinstance(value, int) and "type_" not in key:
            setattr(config, key, min(value, VOCABULARY) if value else value)
        elif isinstance(value, int):
            setattr(config, key, _small(key, value, heads, kv, widths))
        elif key in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            setattr(config, key, _small_rope(value, hidden, heads, _value(config, "head_dim")))
        elif key in ("conv_dim", "tdnn_dim") and isinstance(value, list | tuple):
            setattr(config, key, type(value)(min(v, 32) for v in value))
        elif key in ("image_size", "patch_size") and isinstance(value, list | tuple):
            setattr(config, key, type(value)(_small(key, v, heads, kv, widths) for v in value))
    patch = _value(config, "patch_size")
    size = _value(config, "image_size")
    if isinstance(patch, int) and isinstance(size, int):
        config.image_size = min(size, max(4 * patch, 32))


def _small(key: str, value: int, heads: int | None, kv: Any, widths: dict[int, int]) -> int:
    if "head" in key and not key.endswith(("_dim", "_size")):
        return _small_heads(value, heads, kv)
    if key == "head_dim":
        return min(value, HEAD_SIZE)
    for pattern, limit in _LIMITS:
        if re.search(pattern, key):
            return min(value, limit)
    if key == "image_size":
        return min(value, 64)
    return widths.get(value, value) if value >= 32 else value


def _small_heads(value: int, heads: int | None, kv: Any) -> int:
    """Few heads in the same relation: one KV group, two of two heads, or as many groups as heads."""
    if value <= 1 or heads is None:
        return value
    if value == heads:
        return min(HEADS, value)
    if isinstance(kv, int) and value == kv:
        return 2 if value < heads else min(HEADS, value)
    return min(HEADS, value)


def _small_token(value: Any, seen: dict[int, int]) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_small_token(v, seen) for v in value)
    if not isinstance(value, int) or value < VOCABULARY // 2:
        return value
    return seen.setdefault(value, VOCABULARY // 2 + len(seen))


def _small_rope(value: dict[str, Any], hidden: int | None, heads: int | None, size: Any) -> dict[str, Any]:
    """Lists with one entry a frequency, shortened in proportion to the size of a head."""
    old = size if isinstance(size, int) else (hidden // heads if hidden and heads else None)
    small = dict(value)
    for key, entry in value.items():
        if isinstance(entry, dict):
            small[key] = _small_rope(entry, hidden, heads, size)
        elif isinstance(entry, list) and old and key.endswith("_factor"):
            small[key] = entry[: max(1, len(entry) * min(HEAD_SIZE, old) // old)]
        elif isinstance(entry, list) and old and key == "mrope_section":
            small[key] = _small_sections(entry, max(1, sum(entry) * min(HEAD_SIZE, old) // old))
    return small


def _small_sections(sections: list[int], total: int) -> list[int]:
    each = total // len(sections)
    return [total - each * (len(sections) - 1), *([each] * (len(sections) - 1))] if each else [total]
