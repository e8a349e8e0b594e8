"""Decoders with a plain two-matrix MLP. Each derives the head size from the number of heads."""

from __future__ import annotations

import dataclasses

from hf_shrink.architectures.base import LAYER_NORM, Attention, AttentionLayout, Family, Mlp, Quantity, Stack

ALIBI = "each head has its own ALiBi slope, which the model derives from the number of heads"


def _fused(
    module: str,
    fused: str,
    output: str,
    layout: AttentionLayout,
    attributes: dict[str, Quantity],
    head_size: str = "head_dim",
    norm: str | tuple[str, ...] = "input_layernorm",
) -> Attention:
    path = f"{module}.{fused}"
    return Attention(
        module=module,
        query=path,
        key=path,
        value=path,
        output=f"{module}.{output}",
        layout=layout,
        head_size=head_size,
        attributes=attributes,
        norm=norm,
    )


def _without_norms(stack: Stack, when: dict[str, object]) -> Stack:
    """A variant whose norms feed the residual stream too."""
    assert stack.attention is not None and isinstance(stack.mlp, Mlp)
    return dataclasses.replace(
        stack,
        attention=dataclasses.replace(stack.attention, norm=None),
        mlp=dataclasses.replace(stack.mlp, norm=None),
        when=when,
    )


# Cross attention exists where an encoder was put in front; its matrices play no role here.
GPT2 = Stack(
    "decoder",
    "h",
    _fused(
        "attn", "c_attn", "c_proj", "concatenated", {"num_heads": "heads", "split_size": "query_width"}, norm="ln_1"
    ),
    Mlp(up="mlp.c_fc", down="mlp.c_proj", channels="n_inner", norm="ln_2", activation="activation_function"),
    cached=True,
    residual=LAYER_NORM,
    ignored=("crossattention.c_attn", "crossattention.q_attn", "crossattention.c_proj"),
)
GPT2_SCALED_BY_DEPTH = dataclasses.replace(
    GPT2,
    when={"scale_attn_by_inverse_layer_idx": True},
    depth_fixed="attention is scaled by the number of its block (scale_attn_by_inverse_layer_idx)",
)

NEOX = Stack(
    "decoder",
    "layers",
    _fused("attention", "query_key_value", "dense", "per_head", {}, head_size="head_size"),
    Mlp(up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h", norm="post_attention_layernorm", activation="hidden_act"),
    cached=True,
    residual=LAYER_NORM,
)

OPT = Stack(
    "decoder",
    "decoder.layers",
    Attention(
        module="self_attn",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.out_proj",
        attributes={"num_heads": "heads"},
        norm="self_attn_layer_norm",
    ),
    Mlp(up="fc1", down="fc2", channels="ffn_dim", norm="final_layer_norm", activation="activation_function"),
    cached=True,
    residual=LAYER_NORM,
)
OPT_POST_NORM = _without_norms(OPT, {"do_layer_norm_before": False})

BLOOM = Stack(
    "decoder",
    "h",
    dataclasses.replace(
        _fused("self_attention", "query_key_value", "dense", "per_head", {}),
        fixed=ALIBI,
        whole="it adds the residual stream by itself",
    ),
    # Its GELU has no config key.
    Mlp(up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h", channels=None, norm="post_attention_layernorm"),
    cached=True,
    residual=LAYER_NORM,
)
BLOOM_POST_NORM = _without_norms(BLOOM, {"apply_residual_connection_post_layernorm": True})


def _falcon(layout: AttentionLayout, when: dict[str, object]) -> tuple[Stack, Stack]:
    """One layout of the fused matrix, with ALiBi and with rotary positions."""
    attention = _fused(
        "self_attention",
        "query_key_value",
        "dense",
        layout,
        {"num_heads": "heads", "num_kv_heads": "kv_heads"},
        norm=("ln_attn", "input_layernorm"),
    )
    # In groups keys and values are repeated for every query head before they are cached.
    attention = dataclasses.replace(attention, caches_heads=layout == "per_group")
    # Attention and MLP run side by side on one norm, side by side on two, or one after the other.
    mlp = Mlp(
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        channels="ffn_hidden_size",
        norm=("ln_mlp", "post_attention_layernorm", "input_layernorm"),
        activation="activation",
    )
    rotary = Stack("decoder", "h", attention, mlp, cached=True, when=when, residual=LAYER_NORM)
    fixed = dataclasses.replace(attention, fixed=ALIBI)
    return dataclasses.replace(rotary, attention=fixed, when={"alibi": True, **when}), rotary


FALCON = (
    *_falcon("per_group", {"new_decoder_architecture": True}),
    *_falcon("concatenated", {"multi_query": True}),
    *_falcon("per_head", {}),
)

FAMILIES = [
    Family(("gpt2",), (GPT2_SCALED_BY_DEPTH, GPT2)),
    Family(("gpt_neox",), (NEOX,)),
    Family(("opt",), (OPT_POST_NORM, OPT)),
    Family(("bloom",), (BLOOM_POST_NORM, BLOOM)),
    Family(("falcon",), FALCON),
]
