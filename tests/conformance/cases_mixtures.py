"""Tiny mixtures of experts of unequal sizes: random weights, no download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from conformance.cases import SPECIAL, tokens
from torch import Tensor
from transformers import (
    Dots1Config,
    Dots1ForCausalLM,
    FlexOlmoConfig,
    FlexOlmoForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SIZES: dict[str, Any] = {
    **SPECIAL,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}
# Block 1 is dense, with an MLP of a size of its own.
SPARSE: dict[str, Any] = {**SIZES, "moe_intermediate_size": 24, "num_experts": 5, "mlp_only_layers": [1]}


def _build(kind: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.2)
    return model.float().eval()


def mixtral(**changes: Any) -> PreTrainedModel:
    settings = {**SIZES, "intermediate_size": 80, "head_dim": 16, "num_local_experts": 4, **changes}
    return _build(MixtralForCausalLM, MixtralConfig(**settings))


def qwen3_moe(**changes: Any) -> PreTrainedModel:
    settings = {**SPARSE, "intermediate_size": 80, "head_dim": 16, "norm_topk_prob": True, **changes}
    return _build(Qwen3MoeForCausalLM, Qwen3MoeConfig(**settings))


def qwen2_moe(**changes: Any) -> PreTrainedModel:
    settings = {**SPARSE, "intermediate_size": 80, "shared_expert_intermediate_size": 40, **changes}
    return _build(Qwen2MoeForCausalLM, Qwen2MoeConfig(**settings))


def olmoe(**changes: Any) -> PreTrainedModel:
    return _build(OlmoeForCausalLM, OlmoeConfig(**{**SIZES, "intermediate_size": 24, "num_experts": 5, **changes}))


def glm4_moe(**changes: Any) -> PreTrainedModel:
    """Its router chooses among two groups of three experts first, and corrects its scores to do so."""
    settings = {**SIZES, "intermediate_size": 80, "moe_intermediate_size": 24, "n_routed_experts": 6, "n_group": 2}
    settings |= {"topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 2, "head_dim": 8}
    model = _build(Glm4MoeForCausalLM, Glm4MoeConfig(**{**settings, **changes}))
    for block in model.model.layers:
        if hasattr(block.mlp, "gate"):
            block.mlp.gate.e_score_correction_bias.copy_(torch.rand(len(block.mlp.gate.e_score_correction_bias)) / 5)
    return model


def dots1(**changes: Any) -> PreTrainedModel:
    settings = {**SIZES, "intermediate_size": 80, "moe_intermediate_size": 24, "n_routed_experts": 5, "head_dim": 8}
    return _build(Dots1ForCausalLM, Dots1Config(**{**settings, "n_shared_experts": 1, **changes}))


def flex_olmo(**changes: Any) -> PreTrainedModel:
    settings = {**SIZES, "intermediate_size": 24, "num_experts": 5, **changes}
    return _build(FlexOlmoForCausalLM, FlexOlmoConfig(**settings))


# Of layouts that the ones above have too; tested where experts are pruned.
MORE: dict[str, Callable[..., PreTrainedModel]] = {"glm4_moe": glm4_moe, "dots1": dots1, "flex_olmo": flex_olmo}
MIXTURES: dict[str, Callable[..., PreTrainedModel]] = {
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "qwen2_moe": qwen2_moe,
    "olmoe": olmoe,
}
# What the experts are called in a checkpoint, and how many there are.
NAMES = {"mixtral": ("w1", "w3", "w2")}
COUNTS = {"mixtral": 4}


def names_of(name: str) -> tuple[str, str, str]:
    return NAMES.get(name, ("gate_proj", "up_proj", "down_proj"))


def count_of(name: str) -> int:
    return COUNTS.get(name, 5)


def data(batches: int = 4, length: int = 24) -> list[dict[str, Tensor]]:
    """Batches of eight sequences; every other one has some padding on the left."""
    found = []
    for seed in range(batches):
        mask = torch.ones(8, length, dtype=torch.long)
        if seed % 2:
            mask[:3, :9] = 0
        found.append({"input_ids": tokens(8, length, seed=seed + 1), "attention_mask": mask})
    return found
