"""Decoders whose MLP is a mixture of experts, in all blocks or in some."""

from __future__ import annotations

import dataclasses

from hf_shrink.architectures.base import Experts, Family, Mlp, Stack
from hf_shrink.architectures.families.llama_like import ATTENTION, MLP

SPARSE_BY_NUMBER = "which blocks are sparse follows from their numbers (mlp_only_layers, decoder_sparse_step)"

MIXTRAL_EXPERTS = Experts(
    gate="w1",
    up="w3",
    down="w2",
    count="num_local_experts",
    channels="intermediate_size",
    attributes={**Experts().attributes, "mlp.top_k": "experts_of_token"},
)
MIXTRAL = Stack("decoder", "layers", ATTENTION, None, experts=MIXTRAL_EXPERTS, cached=True)

# Blocks with an ordinary MLP between the sparse ones; the sizes of the two are different config keys.
QWEN3_MOE = Stack("decoder", "layers", ATTENTION, MLP, experts=Experts(), block_lists=("layer_types",), cached=True)

SHARED_EXPERT = Mlp(
    up="mlp.shared_expert.up_proj",
    down="mlp.shared_expert.down_proj",
    gate="mlp.shared_expert.gate_proj",
    channels="shared_expert_intermediate_size",
    module="mlp.shared_expert",
    attributes={"intermediate_size": "channels"},
)
QWEN2_MOE = dataclasses.replace(
    QWEN3_MOE, mlp=(SHARED_EXPERT, MLP), experts=Experts(routers=("mlp.gate", "mlp.shared_expert_gate"))
)


def _by_number(stack: Stack) -> tuple[Stack, Stack]:
    """The stack when every block is sparse, and when some are."""
    free = dataclasses.replace(stack, when={"mlp_only_layers": [], "decoder_sparse_step": 1})
    return free, dataclasses.replace(stack, depth_fixed=SPARSE_BY_NUMBER)


# Queries and keys are normed over all heads at once.
OLMOE = dataclasses.replace(
    MIXTRAL,
    attention=dataclasses.replace(
        ATTENTION, head_size_key=None, fixed="queries and keys are normed over all heads at once"
    ),
    experts=Experts(channels="intermediate_size"),
)

# The router adds a correction to its scores to choose, and may choose among groups of experts first. The width of the
# shared experts follows from two config keys, of which one is the width of the experts.
CORRECTED = Experts(
    entries=("mlp.gate.weight", "mlp.gate.e_score_correction_bias"),
    count="n_routed_experts",
    channels=None,
    groups="n_group",
    groups_of_token="topk_group",
)
SHARED_EXPERTS = Mlp(
    up="mlp.shared_experts.up_proj",
    down="mlp.shared_experts.down_proj",
    gate="mlp.shared_experts.gate_proj",
    channels=None,
    module="mlp.shared_experts",
    attributes={"intermediate_size": "channels"},
)
GLM4_MOE = dataclasses.replace(QWEN3_MOE, mlp=(SHARED_EXPERTS, MLP), experts=CORRECTED)


def _dense_first(stack: Stack) -> tuple[Stack, Stack]:
    """The stack when every block is sparse, and when the first ones are dense."""
    free = dataclasses.replace(stack, when={"first_k_dense_replace": 0})
    return free, dataclasses.replace(stack, depth_fixed="the first blocks are dense (first_k_dense_replace)")


FAMILIES = [
    Family(("mixtral",), (MIXTRAL,)),
    Family(("qwen3_moe",), _by_number(QWEN3_MOE)),
    Family(("qwen2_moe",), _by_number(QWEN2_MOE)),
    Family(("olmoe", "flex_olmo"), (OLMOE,)),
    Family(("glm4_moe", "dots1"), _dense_first(GLM4_MOE)),
]
