"""Models of two stacks, an encoder and a decoder with cross attention: T5, BART and Whisper."""

from __future__ import annotations

import dataclasses

from hf_shrink.architectures.base import LAYER_NORM, Attention, Family, Mlp, Stack

TWO_STACKS = "encoder and decoder share one embedding, and the decoder's cross attention reads both streams"


def _t5_attention(path: str, *, per_head: dict[str, int]) -> Attention:
    # The first block makes the position bias, one entry a head, for all blocks of its stack.
    return Attention(
        module=path,
        query=f"{path}.q",
        key=f"{path}.k",
        value=f"{path}.v",
        output=f"{path}.o",
        heads="num_heads",
        head_size="key_value_proj_dim",
        head_size_key="d_kv",
        attributes={"n_heads": "heads", "inner_dim": "query_width"},
        per_head=per_head,
        norm=f"{path.rpartition('.')[0]}.layer_norm",
        tied=True,
        returns=("position_bias", None),
    )


def _t5_mlp(path: str) -> tuple[Mlp, Mlp]:
    norm = f"{path.rpartition('.')[0]}.layer_norm"
    return (
        Mlp(up=f"{path}.wi_1", down=f"{path}.wo", gate=f"{path}.wi_0", channels="d_ff", norm=norm),
        Mlp(up=f"{path}.wi", down=f"{path}.wo", channels="d_ff", norm=norm, activation="dense_act_fn"),
    )


T5_SELF = _t5_attention("layer.0.SelfAttention", per_head={"relative_attention_bias.weight": 1})
T5 = (
    Stack(
        "encoder",
        "encoder.block",
        T5_SELF,
        _t5_mlp("layer.1.DenseReluDense"),
        depth="num_layers",
        first_is_special=True,
        residual=TWO_STACKS,
    ),
    Stack(
        "decoder",
        "decoder.block",
        T5_SELF,
        _t5_mlp("layer.2.DenseReluDense"),
        cross_attention=_t5_attention("layer.1.EncDecAttention", per_head={}),
        depth="num_decoder_layers",
        first_is_special=True,
        cached=True,
        residual=TWO_STACKS,
    ),
)


def _bart_attention(path: str, heads: str) -> Attention:
    return Attention(
        module=path,
        query=f"{path}.q_proj",
        key=f"{path}.k_proj",
        value=f"{path}.v_proj",
        output=f"{path}.out_proj",
        heads=heads,
        attributes={"num_heads": "heads"},
    )


BART = (
    Stack(
        "encoder",
        "encoder.layers",
        _bart_attention("self_attn", "encoder_attention_heads"),
        Mlp(up="fc1", down="fc2", channels="encoder_ffn_dim", activation="activation_function"),
        depth="encoder_layers",
        residual=LAYER_NORM,
    ),
    Stack(
        "decoder",
        "decoder.layers",
        _bart_attention("self_attn", "decoder_attention_heads"),
        Mlp(up="fc1", down="fc2", channels="decoder_ffn_dim", activation="activation_function"),
        cross_attention=_bart_attention("encoder_attn", "decoder_attention_heads"),
        depth="decoder_layers",
        cached=True,
        residual=LAYER_NORM,
    ),
)


def _pre_norm(stack: Stack) -> Stack:
    """The same blocks with their norms in front of what they feed."""
    assert stack.attention is not None and isinstance(stack.mlp, Mlp)
    cross = stack.cross_attention
    return dataclasses.replace(
        stack,
        attention=dataclasses.replace(stack.attention, norm="self_attn_layer_norm"),
        mlp=dataclasses.replace(stack.mlp, norm="final_layer_norm"),
        cross_attention=dataclasses.replace(cross, norm="encoder_attn_layer_norm") if cross else None,
    )


LAYER_SUM = "the classifier reads a weighted sum of all blocks' outputs (use_weighted_layer_sum)"
WHISPER = tuple(
    dataclasses.replace(_pre_norm(stack), head_lists=("alignment_heads",) if stack.cross_attention else ())
    for stack in BART
)

FAMILIES = [
    Family(("t5",), T5),
    Family(("bart",), BART),
    Family(
        ("whisper",),
        (dataclasses.replace(WHISPER[0], when={"use_weighted_layer_sum": True}, depth_fixed=LAYER_SUM), *WHISPER),
    ),
]
