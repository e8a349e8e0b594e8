"""Tiny decoders of unequal sizes, with inputs: random weights, no download."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

VOCABULARY = 300
BLOCKS = 4
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One tiny model.

    Attributes:
        build: makes it (float32, eval mode, seeded).
        portable_heads: stock config keys can say a smaller number of heads.
        portable_channels: the same for the channels of the MLP.
        fixed_heads: no heads can be removed.
        stack: the name of its stack.
    """

    build: Callable[[], PreTrainedModel]
    portable_heads: bool = True
    portable_channels: bool = True
    fixed_heads: bool = False
    stack: str = "decoder"

    def inputs(self) -> Inputs:
        """Two sequences of 11 tokens, nothing padded."""
        return {"input_ids": tokens(2, 11)}

    def padded(self) -> Inputs:
        """Three sequences of 5, 9 and 12 tokens, padded on the left as for generation."""
        mask = torch.ones(3, 12, dtype=torch.long)
        mask[0, :7] = 0
        mask[1, :3] = 0
        return {"input_ids": tokens(3, 12, seed=2), "attention_mask": mask}


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    """Random ids that are not special tokens."""
    return torch.randint(5, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def _build(kind: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = kind(config)
    # Larger weights than the default initialisation, so that outputs differ visibly when something is wrong.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name or "ln_" in name
            if norm and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.2)
    return model.float().eval()


SPECIAL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
# Three KV groups of two query heads; a head size that hidden_size / heads is not; windows of 4 tokens.
GROUPED: dict[str, Any] = {
    **SPECIAL,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
}
# Every head its own; the head size is hidden_size / heads.
PLAIN: dict[str, Any] = {**SPECIAL, "hidden_size": 48, "num_hidden_layers": BLOCKS, "num_attention_heads": 6}
WINDOWS = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
GEMMA: dict[str, Any] = {
    **GROUPED,
    "head_dim": 10,
    "query_pre_attn_scalar": 10,
    "sliding_window": 4,
    "layer_types": WINDOWS,
}


def _llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**GROUPED, "head_dim": 10, "attention_bias": True, "mlp_bias": True, **changes})


def _qwen2() -> Qwen2Config:
    return Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=4, layer_types=WINDOWS)


def _qwen3() -> Qwen3Config:
    return Qwen3Config(**GROUPED, head_dim=10, use_sliding_window=True, sliding_window=4, layer_types=WINDOWS)


def _smollm3() -> SmolLM3Config:
    return SmolLM3Config(**GROUPED, no_rope_layers=[1, 0, 1, 0], use_sliding_window=False)


def _gemma3() -> Gemma3Config:
    vision: dict[str, Any] = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
    }
    special = {"image_token_index": 4, "boi_token_index": 3, "eoi_token_index": 3, "mm_tokens_per_image": 4}
    return Gemma3Config(
        text_config=Gemma3TextConfig(**GEMMA), vision_config=vision, tie_word_embeddings=False, **special
    )


IMAGE_TOKENS: dict[str, Any] = {
    "image_token_id": 4,
    "video_token_id": 3,
    "vision_start_token_id": 2,
    "vision_end_token_id": 2,
}


def _llava(**changes: Any) -> LlavaConfig:
    vision: dict[str, Any] = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
        "projection_dim": 16,
        "vocab_size": 3,  # as in LLaVA's checkpoints, this says nothing of the text
    }
    text = {**GROUPED, "head_dim": 10, "model_type": "llama"}
    settings = {"image_token_index": 4, "image_seq_length": 16, "tie_word_embeddings": False, **changes}
    return LlavaConfig(text_config=text, vision_config=vision, **settings)


def _qwen2_vl(kind: type[PretrainedConfig] = Qwen2VLConfig, **changes: Any) -> PretrainedConfig:
    if kind is Qwen2VLConfig:
        vision: dict[str, Any] = {"embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2}
    else:
        vision = {"hidden_size": 32, "intermediate_size": 40, "out_hidden_size": 48, "window_size": 16}
        vision["fullatt_block_indexes"] = [1]
    vision |= {"depth": 3, "num_heads": 2, "patch_size": 4}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = {**{k: v for k, v in GROUPED.items() if k != "tie_word_embeddings"}, "rope_parameters": rope}
    settings = {**IMAGE_TOKENS, "tie_word_embeddings": False, **changes}
    return kind(text_config=text, vision_config=vision, **settings)


def _gpt2(**changes: Any) -> GPT2Config:
    return GPT2Config(**{**SPECIAL, "n_embd": 48, "n_layer": BLOCKS, "n_head": 6, "n_positions": 64, **changes})


def _falcon(**changes: Any) -> FalconConfig:
    return FalconConfig(**{**PLAIN, "ffn_hidden_size": 80, "bias": True, **changes})


CASES: dict[str, Case] = {
    "llama": Case(lambda: _build(LlamaForCausalLM, _llama())),
    "llama_tied": Case(lambda: _build(LlamaForCausalLM, _llama(tie_word_embeddings=True))),
    "llama_classifier": Case(lambda: _build(LlamaForSequenceClassification, _llama(num_labels=3))),
    "llama_multi_query": Case(lambda: _build(LlamaForCausalLM, _llama(num_key_value_heads=1))),
    # No head size in the config: it is 48 / 6 until heads are removed.
    "llama_derived_head_size": Case(lambda: _build(LlamaForCausalLM, _llama(head_dim=None))),
    "mistral": Case(lambda: _build(MistralForCausalLM, MistralConfig(**GROUPED, head_dim=10, sliding_window=4))),
    "qwen2": Case(lambda: _build(Qwen2ForCausalLM, _qwen2())),
    "qwen3": Case(lambda: _build(Qwen3ForCausalLM, _qwen3())),
    "gemma2": Case(lambda: _build(Gemma2ForCausalLM, Gemma2Config(**GEMMA))),
    "gemma3_text": Case(lambda: _build(Gemma3ForCausalLM, Gemma3TextConfig(**GEMMA))),
    "gemma3": Case(lambda: _build(Gemma3ForConditionalGeneration, _gemma3()), stack="text"),
    "llava": Case(lambda: _build(LlavaForConditionalGeneration, _llava()), stack="text"),
    "llava_tied": Case(lambda: _build(LlavaForConditionalGeneration, _llava(tie_word_embeddings=True)), stack="text"),
    "qwen2_vl": Case(lambda: _build(Qwen2VLForConditionalGeneration, _qwen2_vl()), portable_heads=False, stack="text"),
    "qwen2_vl_tied": Case(
        lambda: _build(Qwen2VLForConditionalGeneration, _qwen2_vl(tie_word_embeddings=True)),
        portable_heads=False,
        stack="text",
    ),
    "qwen2_5_vl": Case(
        lambda: _build(Qwen2_5_VLForConditionalGeneration, _qwen2_vl(Qwen2_5_VLConfig)),
        portable_heads=False,
        stack="text",
    ),
    "smollm3": Case(lambda: _build(SmolLM3ForCausalLM, _smollm3())),
    "phi3": Case(lambda: _build(Phi3ForCausalLM, Phi3Config(**GROUPED))),
    "gpt2": Case(lambda: _build(GPT2LMHeadModel, _gpt2()), portable_heads=False),
    "gpt2_narrow": Case(lambda: _build(GPT2LMHeadModel, _gpt2(n_inner=80)), portable_heads=False),
    "gpt_neox": Case(
        lambda: _build(GPTNeoXForCausalLM, GPTNeoXConfig(**PLAIN, intermediate_size=80)), portable_heads=False
    ),
    "opt": Case(
        lambda: _build(OPTForCausalLM, OPTConfig(**PLAIN, ffn_dim=80, word_embed_proj_dim=32)), portable_heads=False
    ),
    "opt_post_norm": Case(
        lambda: _build(OPTForCausalLM, OPTConfig(**PLAIN, ffn_dim=80, do_layer_norm_before=False)), portable_heads=False
    ),
    "falcon_multi_query": Case(lambda: _build(FalconForCausalLM, _falcon()), portable_heads=False),
    "falcon_per_head": Case(
        lambda: _build(FalconForCausalLM, _falcon(multi_query=False, parallel_attn=False)), portable_heads=False
    ),
    "falcon_grouped": Case(
        lambda: _build(FalconForCausalLM, _falcon(new_decoder_architecture=True, num_kv_heads=3)), portable_heads=False
    ),
    "falcon_alibi": Case(
        lambda: _build(FalconForCausalLM, _falcon(alibi=True, multi_query=False)),
        portable_heads=False,
        fixed_heads=True,
    ),
    "bloom": Case(
        lambda: _build(BloomForCausalLM, BloomConfig(**SPECIAL, hidden_size=48, n_layer=BLOCKS, n_head=6)),
        portable_heads=False,
        portable_channels=False,
        fixed_heads=True,
    ),
}
