"""What transformers calls the parts of a block: from names of modules to declarations that may be right.

Nothing here is believed before it is verified (`verify.py`); a wrong guess costs time, never a wrong model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from hf_shrink.architectures.base import Attention, AttentionLayout, Mlp, Quantity
from hf_shrink.architectures.linears import is_matrix, shape

SEPARATE = (
    *(("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"), ("q_lin", "k_lin", "v_lin")),
    *(("query_proj", "key_proj", "value_proj"), ("to_q", "to_k", "to_v"), ("wq", "wk", "wv"), ("Wq", "Wk", "Wv")),
    *(
        ("linear_q", "linear_k", "linear_v"),
        ("query_layer", "key_layer", "value_layer"),
        ("proj_q", "proj_k", "proj_v"),
    ),
    *(("relative_q_proj", "relative_k_proj", "relative_v_proj"), ("q_linear", "k_linear", "v_linear")),
)
FUSED = (
    *("qkv", "qkv_proj", "c_attn", "query_key_value", "Wqkv", "wqkv", "in_proj", "to_qkv", "att_proj", "W_pack"),
    *("qkv_linear", "linear_qkv", "in_proj_qkv"),
)
OUTPUT = (
    *("o_proj", "out_proj", "o", "out_lin", "output.dense", "dense", "wo", "Wo", "c_proj", "proj", "out", "to_out"),
    *("to_out.0", "linear_out", "output_proj", "attn_out", "projection", "o_lin", "post", "output", "final_linear"),
)
MLPS = (  # gate (or None), up, down
    *(("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("gate", "up", "down"), ("wi_0", "wi_1", "wo")),
    *(("c_fc_0", "c_fc_1", "c_proj"), ("linear_1", "linear_v", "linear_2"), ("w1", "v1", "w2")),
    *((None, "fc1", "fc2"), (None, "up_proj", "down_proj"), (None, "gate_up_proj", "down_proj")),
    *((None, "intermediate.dense", "output.dense"), (None, "wi", "wo"), (None, "Wi", "Wo"), (None, "c_fc", "c_proj")),
    *((None, "dense_h_to_4h", "dense_4h_to_h"), (None, "lin1", "lin2"), (None, "linear1", "linear2")),
    *((None, "linear_1", "linear_2"), (None, "linear_fc1", "linear_fc2"), (None, "intermediate_dense", "output_dense")),
    *((None, "fc_in", "fc_out"), (None, "dense1", "dense2"), (None, "dense_1", "dense_2"), (None, "layer1", "layer2")),
    *((None, "input_linear", "output_linear"), (None, "layer_1", "layer_2"), (None, "w_in", "w_out"), (None, "0", "2")),
    *((None, "ffn_layer_1", "ffn_layer_2"), (None, "weights_in", "weights_out"), (None, "ff_proj", "ff_out")),
)
_CROSS = re.compile(r"cross|encoder_attn|encdec|enc_dec|encoder_attention|src_attn|enc_attn", re.IGNORECASE)
_EXPERT = re.compile(r"(^|\.)(\w*experts)(\.\d+)?(\.|$)")

HEAD_SIZE = (
    *("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "dim_head", "attn_head_size", "d_k"),
    *("size_per_head", "attention_head_dim", "channels_per_head"),
)
_ATTRIBUTES: dict[str, Quantity] = {
    **dict.fromkeys(
        ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_attn_heads", "h", "heads", "attention_heads"),
        "heads",
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads"), "kv_heads"),
    **dict.fromkeys(("num_key_value_groups", "num_kv_groups", "n_rep", "num_groups"), "heads_per_group"),
    **dict.fromkeys(("all_head_size", "inner_dim", "attention_dim", "qkv_dim", "attn_dim", "q_dim"), "query_width"),
    **dict.fromkeys(("kv_dim", "kv_size", "kv_width"), "kv_width"),
}
# These say the width of the heads together in some classes, of the residual stream in others.
_WIDTHS = ("embed_dim", "hidden_size", "dim", "d_model", "split_size", "hidden_dim", "n_embd", "channels", "output_dim")
_CHANNEL_ATTRIBUTES = ("intermediate_size", "ffn_dim", "d_ff", "hidden_features", "ffn_hidden_size", "inner_dim")


def attentions(block: nn.Module) -> list[tuple[bool, list[Attention]]]:
    """For each attention of a block whether it looks at another stack, and the forms that it may have, likelier first.

    Names of matrices say query, key, value and output; attributes of their module say how heads are counted.
    """
    matrices = {name: module for name, module in block.named_modules() if is_matrix(module)}
    found = []
    for name in matrices:
        parent, _, tail = name.rpartition(".")
        if _EXPERT.search(name):
            continue
        for q, k, v in SEPARATE:
            paths = [_join(parent, part) for part in (q, k, v)]
            if tail == q and all(path in matrices for path in paths):
                rows = shape(matrices[name])[0]
                for output in _outputs(matrices, parent, paths, rows):
                    found.append((bool(_CROSS.search(name)), _forms(block, parent, paths, output, ("separate",))))
                    break
                break
        if tail in FUSED:
            for output in _outputs(matrices, parent, [name], None):
                layouts: tuple[AttentionLayout, ...] = ("concatenated", "per_head", "per_group")
                found.append((bool(_CROSS.search(name)), _forms(block, parent, [name] * 3, output, layouts)))
                break
    return found


def mlps(block: nn.Module, taken: set[str]) -> list[Mlp]:
    """The MLPs that a block may have: by name, then any two matrices side by side that widen and narrow again.

    Args:
        taken: paths of matrices that attention holds.
    """
    matrices = {n: m for n, m in block.named_modules() if is_matrix(m) and n not in taken and not _EXPERT.search(n)}
    found: list[Mlp] = []
    used: set[str] = set()
    for parent, _ in block.named_modules():
        for gate, up, down in MLPS:
            paths = [_join(parent, tail) for tail in (gate, up, down) if tail is not None]
            if all(path in matrices and path not in used for path in paths) and _widens(matrices, paths[-2], paths[-1]):
                used.update(paths)
                found.append(_mlp(block, parent, matrices, _join(parent, gate) if gate else None, paths[-2], paths[-1]))
                break
    left = [name for name in matrices if name not in used]
    for up in left:
        for down in left:
            together = up.rpartition(".")[0] == down.rpartition(".")[0]
            if together and up != down and not used & {up, down} and _widens(matrices, up, down):
                used.update((up, down))
                found.append(_mlp(block, up.rpartition(".")[0], matrices, None, up, down))
    return found


def _join(parent: str, tail: str) -> str:
    return f"{parent}.{tail}" if parent else tail


def _outputs(matrices: dict[str, nn.Module], parent: str, inner: list[str], rows: int | None) -> Iterator[str]:
    """The output beside query, key and value, or one level up."""
    above = parent.rpartition(".")[0]
    for owner in (parent, above) if parent else (parent,):
        for tail in OUTPUT:
            path = _join(owner, tail)
            if path in matrices and path not in inner and rows in (None, shape(matrices[path])[1]):
                yield path


def _forms(
    block: nn.Module, parent: str, paths: list[str], output: str, layouts: tuple[AttentionLayout, ...]
) -> list[Attention]:
    owner = block.get_submodule(parent)
    numbers = {k: v for k, v in vars(owner).items() if isinstance(v, int) and not isinstance(v, bool)}
    width = shape(block.get_submodule(output))[1]
    counts = {name: quantity for name, quantity in _ATTRIBUTES.items() if name in numbers}
    size = next((name for name in HEAD_SIZE if numbers.get(name, 0) > 0 and width % numbers[name] == 0), None)
    count = next((name for name, q in counts.items() if q == "heads" and width % max(numbers[name], 1) == 0), None)
    if size is None and count is None:
        return []
    widths: dict[str, Quantity] = {name: "query_width" for name in _WIDTHS if numbers.get(name) == width}
    forms = []
    for layout in layouts:
        for attributes in (counts, counts | widths) if widths else (counts,):
            forms.append(
                Attention(
                    module=parent,
                    query=paths[0],
                    key=paths[1],
                    value=paths[2],
                    output=output,
                    layout=layout,
                    head_size=size or "",
                    head_count=count if size is None else None,
                    attributes=attributes,
                )
            )
    return forms


def _widens(matrices: dict[str, nn.Module], up: str, down: str) -> bool:
    """Whether `down` reads what `up` writes, or half as much (a gate fused with it)."""
    (rows, columns), (out, inner) = shape(matrices[up]), shape(matrices[down])
    return out == columns and rows in (inner, 2 * inner)


def _mlp(block: nn.Module, parent: str, matrices: dict[str, nn.Module], gate: str | None, up: str, down: str) -> Mlp:
    channels = shape(matrices[down])[1]
    if gate is None and shape(matrices[up])[0] == 2 * channels:
        gate = up
    owner = block.get_submodule(parent)
    attributes: dict[str, Quantity] = {
        name: "channels" for name in _CHANNEL_ATTRIBUTES if vars(owner).get(name) == channels
    }
    return Mlp(up=up, down=down, gate=gate, channels=None, module=parent, attributes=attributes)
