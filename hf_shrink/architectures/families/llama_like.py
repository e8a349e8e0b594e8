"""Decoders with a gated MLP and separate query, key, value and output, and the ones that fuse them."""

from __future__ import annotations

import dataclasses

from hf_shrink.architectures.base import Attention, Family, Mlp, Residual, Stack

ATTENTION = Attention(
    module="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    kv_heads="num_key_value_heads",
    head_size_key="head_dim",
    attributes={"num_key_value_groups": "heads_per_group"},
    norm="input_layernorm",
)
MLP = Mlp(
    up="mlp.up_proj",
    down="mlp.down_proj",
    gate="mlp.gate_proj",
    module="mlp",
    attributes={"intermediate_size": "channels"},
    norm="post_attention_layernorm",
)
STACK = Stack(
    "decoder",
    "layers",
    ATTENTION,
    MLP,
    block_lists=("layer_types",),
    cached=True,
    residual=Residual("embed_tokens", "norm", ("lm_head", "score", "qa_outputs")),
)

# Norms store their weight minus 1; two more of them weigh what a block adds to the residual stream.
FOUR_NORMS = dataclasses.replace(
    STACK,
    mlp=dataclasses.replace(MLP, norm="pre_feedforward_layernorm"),
    norm_offset=1.0,
    residual="norms weigh what attention and MLP add to the residual stream, channel by channel",
)

# The attention finds where its queries end by the config's number of heads.
FUSED_ATTENTION = dataclasses.replace(
    ATTENTION,
    query="self_attn.qkv_proj",
    key="self_attn.qkv_proj",
    value="self_attn.qkv_proj",
    layout="concatenated",
    attributes={
        "num_key_value_groups": "heads_per_group",
        "num_key_value_heads": "kv_heads",
        "config.num_attention_heads": "heads",
    },
)
FUSED_MLP = Mlp(up="mlp.gate_up_proj", down="mlp.down_proj", gate="mlp.gate_up_proj", norm=MLP.norm)

SCALED = Residual("embed_tokens", "norm", ("lm_head", "score", "qa_outputs"), scaled="embed_scale")

FAMILIES = [
    Family(("llama", "mistral", "qwen2", "qwen3"), (STACK,)),
    # Of this kind's first generation: norms store their weight minus 1, and that is all.
    Family(("gemma",), (dataclasses.replace(STACK, norm_offset=1.0, residual=SCALED),)),
    Family(("gemma2", "gemma3_text"), (FOUR_NORMS,)),
    Family(("smollm3",), (dataclasses.replace(STACK, block_lists=("layer_types", "no_rope_layers")),)),
    Family(("phi3",), (dataclasses.replace(STACK, attention=FUSED_ATTENTION, mlp=FUSED_MLP),)),
]
