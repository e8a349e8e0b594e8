"""Text encoders: BERT and its kin, DistilBERT, ModernBERT. All derive the head size from the number of heads."""

from __future__ import annotations

from hf_shrink.architectures.base import LAYER_NORM, Attention, Family, Mlp, Stack


def _bert_attention(path: str) -> Attention:
    return Attention(
        module=f"{path}.self",
        query=f"{path}.self.query",
        key=f"{path}.self.key",
        value=f"{path}.self.value",
        output=f"{path}.output.dense",
        head_size="attention_head_size",
        attributes={"num_attention_heads": "heads", "all_head_size": "query_width"},
        norm_behind=f"{path}.output.LayerNorm",
    )


BERT = Stack(
    "encoder",
    "encoder.layer",
    _bert_attention("attention"),
    Mlp(up="intermediate.dense", down="output.dense", activation="hidden_act", norm_behind="output.LayerNorm"),
    cross_attention=_bert_attention("crossattention"),
    residual=LAYER_NORM,
)
DISTILBERT = Stack(
    "encoder",
    "transformer.layer",
    Attention(
        module="attention",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        output="attention.out_lin",
        heads="n_heads",
        head_size="attention_head_size",
        attributes={"n_heads": "heads", "dim": "query_width"},
        norm_behind="sa_layer_norm",
    ),
    Mlp(
        up="ffn.lin1",
        down="ffn.lin2",
        channels="hidden_dim",
        activation="activation",
        norm_behind="output_layer_norm",
    ),
    depth="n_layers",
    residual=LAYER_NORM,
)
# The first block has no norm in front of its attention: the embeddings are normalised already.
MODERNBERT = Stack(
    "encoder",
    "layers",
    Attention(
        module="attn",
        query="attn.Wqkv",
        key="attn.Wqkv",
        value="attn.Wqkv",
        output="attn.Wo",
        layout="concatenated",
        norm="attn_norm",
    ),
    Mlp(up="mlp.Wi", down="mlp.Wo", gate="mlp.Wi", norm="mlp_norm"),
    block_lists=("layer_types",),
    first_is_special=True,
    residual=LAYER_NORM,
)

FAMILIES = [
    Family(("bert", "roberta", "xlm-roberta", "camembert"), (BERT,)),
    Family(("distilbert",), (DISTILBERT,)),
    Family(("modernbert",), (MODERNBERT,)),
]
