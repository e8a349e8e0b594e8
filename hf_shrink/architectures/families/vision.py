"""Image encoders, and CLIP, which pairs one with a text encoder."""

from __future__ import annotations

from hf_shrink.architectures.base import LAYER_NORM, Attention, Family, Mlp, Stack

VIT = Stack(
    "vision",
    "layers",
    Attention(
        module="attention",
        query="attention.q_proj",
        key="attention.k_proj",
        value="attention.v_proj",
        output="attention.o_proj",
        # Not among the declared config keys, but the model reads it where it is set.
        head_size_key="head_dim",
        attributes={"num_attention_heads": "heads"},
        norm="layernorm_before",
    ),
    Mlp(up="mlp.fc1", down="mlp.fc2", norm="layernorm_after", activation="hidden_act"),
    residual=LAYER_NORM,
)


def _clip(name: str, tower: str = "", config: str = "") -> Stack:
    return Stack(
        name,
        f"{tower}encoder.layers",
        Attention(
            module="self_attn",
            query="self_attn.q_proj",
            key="self_attn.k_proj",
            value="self_attn.v_proj",
            output="self_attn.out_proj",
            attributes={"num_heads": "heads"},
            norm="layer_norm1",
        ),
        Mlp(up="mlp.fc1", down="mlp.fc2", norm="layer_norm2", activation="hidden_act"),
        config=config,
        residual=LAYER_NORM,
    )


FAMILIES = [
    Family(("vit",), (VIT,)),
    Family(("clip",), (_clip("text", "text_model.", "text_config"), _clip("vision", "vision_model.", "vision_config"))),
    Family(("clip_text_model",), (_clip("text"),)),
    Family(("clip_vision_model",), (_clip("vision"),)),
]
