"""The words in which a family is declared: which path of a block plays which role, and what its config calls it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

AttentionLayout = Literal["separate", "concatenated", "per_head", "per_group"]
Quantity = Literal["heads", "kv_heads", "heads_per_group", "query_width", "kv_width", "channels"]
ExpertQuantity = Literal["experts", "experts_of_token", "channels"]


@dataclass(frozen=True)
class Attention:
    """Where a block's attention keeps its four matrices. Paths are relative to the block.

    Attributes:
        module: the module that holds `attributes` (and the head size).
        query, key, value, output: paths of the Linears; one path three times when fused.
        layout: how rows of a fused matrix are ordered: "concatenated" [q; k; v], "per_head" [q, k, v] for each head,
            "per_group" [q of each query head, k, v] for each KV group; "separate" when nothing is fused.
        heads, kv_heads: config keys of the counts (None for kv_heads: as many as heads).
        head_size: attribute of `module` with the size of a head.
        head_size_key: config key when the config has a head size of its own; None: derived from the head count, so
            that removing heads can only be stored as uneven.
        attributes: attributes of `module` to patch after surgery, and the quantity that each holds.
        per_head: parameters with one entry a head, {path of the parameter: dimension} (a relative position bias).
        norm: path of the norm that feeds query, key and value (of a cross attention: query) and, but for other
            matrices, nothing else; of several the first that a block has. None: there is none, as where norms come
            after the residual sum.
        norm_behind: path of the norm over the residual sum, where it comes behind; the next part reads it and adds to
            it. None: there is none.
        tied: every block of the stack must keep the same heads (a position bias is handed from block to block).
        fixed: why heads cannot be removed at all; None when they can.
        head_count: attribute of `module` with the number of query heads, where none says the size of a head.
        returns: what `module` returns behind its output: the argument of that name, or None for what nobody needs.
        whole: why the attention cannot be taken out of its block; None when it can.
        caches_heads: the KV cache gets keys and values of every query head, not of every KV group.
    """

    module: str
    query: str
    key: str
    value: str
    output: str
    layout: AttentionLayout = "separate"
    heads: str = "num_attention_heads"
    kv_heads: str | None = None
    head_size: str = "head_dim"
    head_size_key: str | None = None
    attributes: Mapping[str, Quantity] = field(default_factory=dict)
    per_head: Mapping[str, int] = field(default_factory=dict)
    norm: str | tuple[str, ...] | None = None
    norm_behind: str | None = None
    tied: bool = False
    fixed: str | None = None
    head_count: str | None = None
    returns: tuple[str | None, ...] = (None,)
    whole: str | None = None
    caches_heads: bool = False


@dataclass(frozen=True)
class Mlp:
    """Where a block's MLP keeps its matrices. Paths are relative to the block.

    Attributes:
        up, down, gate: paths of the Linears; `gate` equals `up` when fused as [gate; up], None when there is no gate.
        channels: config key of the hidden width; None when no key says it, so that any change of it is uneven.
        module, attributes: as in Attention.
        norm, norm_behind: as in Attention, of what feeds up and gate.
        activation: config key with the name of the function between up and down, where there is no gate.
        whole: why the MLP cannot be taken out of its block; None when it can.
    """

    up: str
    down: str
    gate: str | None = None
    channels: str | None = "intermediate_size"
    module: str = ""
    attributes: Mapping[str, Quantity] = field(default_factory=dict)
    norm: str | tuple[str, ...] | None = None
    norm_behind: str | None = None
    activation: str | None = None
    whole: str | None = None


@dataclass(frozen=True)
class Residual:
    """What reads and writes a residual stream outside of its blocks, for stacks whose norms keep rotations.

    Such norms only divide by the root mean square and multiply by a weight, and feed nothing but matrices; what a block
    adds to the stream comes from matrices without a norm in between.

    Attributes:
        embedding, norm: paths of the embedding and of the last norm, beside the list of blocks.
        heads: paths, from the model itself, of the Linears that may read the last norm; a model has some of them.
        width: config key of the number of channels.
        scaled: attribute of the embedding that multiplies its rows by the square root of the width, if there is one.
    """

    embedding: str
    norm: str
    heads: tuple[str, ...]
    width: str = "hidden_size"
    scaled: str | None = None


NOT_DECLARED = "its table does not say what reads and writes the residual stream"
LAYER_NORM = "LayerNorm subtracts the mean, which a rotation does not keep"


@dataclass(frozen=True)
class Experts:
    """Where a block's mixture keeps its experts: one module with two 3D parameters. Paths are relative to the block.

    The module is called with hidden states (tokens, width), indices and weights (tokens, experts of a token); the index
    after the last expert means none. An expert gives `down(activation(gate(x)) * up(x))`.

    Attributes:
        module: the module that holds the parameters `fused` and `down_fused`, and the activation.
        gate, up, down: what the Linears of one expert are called in a checkpoint.
        fused: parameter (experts, 2 * channels, width), every expert's [gate; up].
        down_fused: parameter (experts, width, channels).
        activation: attribute of `module`.
        routers: modules that decide which experts a token goes to, or how much they count; always left dense. The first
            decides, and returns its logits (tokens, experts) first.
        entries: parameters and buffers with one entry an expert in their first dimension.
        count, of_token: config keys of the number of experts, and of how many a token goes to.
        channels: config key of the hidden width of an expert, which nothing else takes its size from; None where there
            is none, so that any change of it is uneven.
        attributes: attributes to patch after surgery, and the quantity that each holds.
        groups, groups_of_token: config keys of routers that choose among groups of neighbouring experts first, by the
            two best of each: the number of groups, and of those that a token goes to; None where the router knows no
            groups. Where there is one group, all experts compete, and the router still asks for two.
        fixed: why experts cannot be removed; None when they can.
    """

    module: str = "mlp.experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    fused: str = "gate_up_proj"
    down_fused: str = "down_proj"
    activation: str = "act_fn"
    routers: tuple[str, ...] = ("mlp.gate",)
    entries: tuple[str, ...] = ("mlp.gate.weight",)
    count: str = "num_experts"
    of_token: str = "num_experts_per_tok"
    channels: str | None = "moe_intermediate_size"
    attributes: Mapping[str, ExpertQuantity] = field(
        default_factory=lambda: {
            "mlp.gate.num_experts": "experts",
            "mlp.gate.top_k": "experts_of_token",
            "mlp.experts.num_experts": "experts",
            "mlp.experts.intermediate_dim": "channels",
        }
    )
    groups: str | None = None
    groups_of_token: str | None = None
    fixed: str | None = None


@dataclass(frozen=True)
class Stack:
    """One row of blocks.

    Attributes:
        name: "decoder", "encoder", "text" or "vision".
        blocks: the end of the path of the ModuleList, such as "layers" or "encoder.layer".
        depth: config key of the number of blocks.
        config: path from the model's config to the sub-config with the keys ("" for itself).
        attention, cross_attention, mlp: the roles; None where blocks have none. Of several forms of `mlp` the first
            whose paths a block has is bound; `cross_attention` is bound in the blocks that have its module (in a BERT
            only when it is a decoder).
        experts: the mixture of the blocks that have its module; such blocks may have an MLP beside it (a shared
            expert), or none.
        block_lists: config keys with one entry a block (layer types and the like).
        head_lists: keys of the generation config with pairs [block, head of its cross attention].
        first_is_special: the first block differs from the rest by construction, so it is never removed.
        cached: blocks write a KV cache.
        ignored: Linears inside a block that play no role (they can be quantized, not pruned), relative to the block.
        when: config keys and the values with which this declaration applies; of several declarations of one stack
            (old and new layouts of a family) the first that applies is used.
        depth_fixed: why blocks cannot be removed; None when they can.
        norm_offset: what the blocks' norms add to their stored weight (1 where they store the weight minus 1).
        residual: what is needed to rotate the residual stream, or why it cannot be rotated.
        found: derived by convention and verified, not written down: a block may lack any of the parts and may hold
            other matrices beside them, and nothing is known of norms.
    """

    name: str
    blocks: str
    attention: Attention | None
    mlp: Mlp | tuple[Mlp, ...] | None
    cross_attention: Attention | None = None
    experts: Experts | None = None
    depth: str = "num_hidden_layers"
    config: str = ""
    block_lists: tuple[str, ...] = ()
    head_lists: tuple[str, ...] = ()
    first_is_special: bool = False
    cached: bool = False
    ignored: tuple[str, ...] = ()
    when: Mapping[str, object] = field(default_factory=dict)
    depth_fixed: str | None = None
    norm_offset: float = 0.0
    residual: Residual | str = NOT_DECLARED
    found: bool = False


@dataclass(frozen=True)
class Family:
    """All that is known of one kind of model, by its `config.model_type`s.

    Attributes:
        towers: the ends of the paths of modules that run before the stacks and feed them (an image encoder). Their
            blocks are found by search, have no roles, and are quantized only where a recipe asks for them.
    """

    model_types: tuple[str, ...]
    stacks: tuple[Stack, ...]
    towers: tuple[str, ...] = ()
