"""Tiny encoders, vision models and encoder-decoders of unequal sizes, with inputs: random weights, no download."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    CamembertConfig,
    CamembertForMaskedLM,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    WhisperConfig,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
    XLMRobertaConfig,
    XLMRobertaForTokenClassification,
)

VOCABULARY = 300
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """How to build one tiny model (float32, eval mode, seeded) and what to call it with."""

    build: Callable[[], PreTrainedModel]
    inputs: Callable[[], Inputs]


def _build(kind: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = kind(config)
    # Larger weights than the default initialisation, so that outputs differ visibly when something is wrong.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.2)
    return model.float().eval()


def _tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(5, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def _text() -> Inputs:
    return {"input_ids": _tokens(2, 11)}


def _padded() -> Inputs:
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1, 7:] = 0
    mask[2, 10:] = 0
    return {"input_ids": _tokens(3, 12), "attention_mask": mask}


def _left_to_right() -> Inputs:
    return {"input_ids": _tokens(2, 9), "encoder_hidden_states": _noise(2, 7, 48)}


def _seq2seq() -> Inputs:
    return {**_padded(), "decoder_input_ids": _tokens(3, 9, seed=3)}


def _image() -> Inputs:
    return {"pixel_values": _noise(2, 3, 16, 16)}


def _image_and_text() -> Inputs:
    return {**_padded(), **_image()}


def _audio() -> Inputs:
    return {"input_features": _noise(2, 10, 24)}


def _speech() -> Inputs:
    return {**_audio(), "decoder_input_ids": _tokens(2, 9)}


SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 40,
    **SPECIAL,
}
IMAGE: dict[str, Any] = {
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "image_size": 16,
    "patch_size": 4,
}
PAIR: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 48,
    "encoder_layers": 3,
    "decoder_layers": 4,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 72,
    "decoder_ffn_dim": 56,
    "decoder_start_token_id": 1,
    **SPECIAL,
}


WHISPER: dict[str, Any] = {
    **PAIR,
    "num_mel_bins": 10,
    "max_source_positions": 12,
    "max_target_positions": 20,
    "begin_suppress_tokens": None,
}


def _distilbert() -> DistilBertConfig:
    return DistilBertConfig(
        vocab_size=VOCABULARY, dim=48, hidden_dim=80, n_layers=3, n_heads=6, max_position_embeddings=40
    )


def _modernbert() -> ModernBertConfig:
    # Windows of 5 tokens, so that the kind of a block matters within the short inputs.
    types = ["full_attention", "sliding_attention", "full_attention"]
    return ModernBertConfig(
        **TEXT,
        layer_types=types,
        local_attention=4,
        attention_bias=True,
        mlp_bias=True,
        cls_token_id=1,
        sep_token_id=2,
    )


def _clip() -> CLIPConfig:
    return CLIPConfig(
        text_config=CLIPTextConfig(**TEXT).to_dict(),
        vision_config=CLIPVisionConfig(**IMAGE).to_dict(),
        projection_dim=20,
    )


def _t5(**changes: Any) -> T5Config:
    return T5Config(
        vocab_size=VOCABULARY,
        d_model=48,
        d_kv=10,
        d_ff=72,
        num_layers=3,
        num_decoder_layers=4,
        num_heads=6,
        decoder_start_token_id=0,
        **changes,
    )


CASES: dict[str, Case] = {
    "bert": Case(lambda: _build(BertModel, BertConfig(**TEXT)), _padded),
    "bert_masked_lm": Case(lambda: _build(BertForMaskedLM, BertConfig(**TEXT)), _text),
    "bert_classifier": Case(lambda: _build(BertForSequenceClassification, BertConfig(**TEXT)), _padded),
    "bert_decoder": Case(
        lambda: _build(BertLMHeadModel, BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)), _left_to_right
    ),
    "roberta_classifier": Case(lambda: _build(RobertaForSequenceClassification, RobertaConfig(**TEXT)), _padded),
    "xlm_roberta_tagger": Case(lambda: _build(XLMRobertaForTokenClassification, XLMRobertaConfig(**TEXT)), _padded),
    "camembert_masked_lm": Case(lambda: _build(CamembertForMaskedLM, CamembertConfig(**TEXT)), _padded),
    "distilbert_classifier": Case(lambda: _build(DistilBertForSequenceClassification, _distilbert()), _padded),
    "modernbert_masked_lm": Case(lambda: _build(ModernBertForMaskedLM, _modernbert()), _padded),
    "vit": Case(lambda: _build(ViTModel, ViTConfig(**IMAGE)), _image),
    "vit_classifier": Case(lambda: _build(ViTForImageClassification, ViTConfig(**IMAGE)), _image),
    "clip": Case(lambda: _build(CLIPModel, _clip()), _image_and_text),
    "clip_classifier": Case(lambda: _build(CLIPForImageClassification, _clip()), _image),
    "clip_text": Case(lambda: _build(CLIPTextModel, CLIPTextConfig(**TEXT)), _padded),
    "clip_text_projection": Case(lambda: _build(CLIPTextModelWithProjection, CLIPTextConfig(**TEXT)), _padded),
    "clip_vision": Case(lambda: _build(CLIPVisionModel, CLIPVisionConfig(**IMAGE)), _image),
    "whisper": Case(lambda: _build(WhisperForConditionalGeneration, WhisperConfig(**WHISPER)), _speech),
    "whisper_classifier": Case(lambda: _build(WhisperForAudioClassification, WhisperConfig(**WHISPER)), _audio),
    "t5": Case(lambda: _build(T5ForConditionalGeneration, _t5()), _seq2seq),
    "t5_gated": Case(lambda: _build(T5ForConditionalGeneration, _t5(feed_forward_proj="gated-gelu")), _seq2seq),
    "t5_encoder": Case(lambda: _build(T5EncoderModel, _t5()), _padded),
    "bart": Case(
        lambda: _build(BartForConditionalGeneration, BartConfig(**PAIR, max_position_embeddings=40)), _seq2seq
    ),
    "bart_classifier": Case(
        lambda: _build(BartForSequenceClassification, BartConfig(**PAIR, max_position_embeddings=40)),
        lambda: {"input_ids": torch.cat([_tokens(2, 8), torch.full((2, 1), 2)], dim=1)},
    ),
}
