"""Tiny encoders, seq2seq, vision and speech models for the data tests: random weights, no download."""

from __future__ import annotations

import torch
from tiny import VOCABULARY, tiny_tokenizer
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BlipConfig,
    BlipForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

_SIDE = {"layers": 2, "ffn_dim": 48, "attention_heads": 2}
CLS, SEP, MASK = VOCABULARY, VOCABULARY + 1, VOCABULARY + 2


def encoder_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer with [CLS], [SEP] and [MASK] as ids 320, 321 and 322."""
    inner = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
    inner.add_special_tokens(["[CLS]", "[SEP]", "[MASK]"])
    inner.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]"
    )


def _encoder_settings() -> dict[str, int]:
    return {
        "vocab_size": VOCABULARY + 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }


def tiny_bert_mlm() -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(**_encoder_settings())).eval()


def tiny_bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**_encoder_settings())).eval()


def tiny_roberta_mlm() -> RobertaForMaskedLM:
    torch.manual_seed(0)
    return RobertaForMaskedLM(RobertaConfig(**_encoder_settings(), pad_token_id=0, bos_token_id=CLS, eos_token_id=SEP))


def tiny_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config).eval()


def tiny_bart() -> BartForConditionalGeneration:
    torch.manual_seed(0)
    sides = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in _SIDE.items()}
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        max_position_embeddings=64,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **sides,
    )
    return BartForConditionalGeneration(config).eval()


def tiny_blip() -> BlipForConditionalGeneration:
    torch.manual_seed(0)
    layers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = dict(layers, vocab_size=VOCABULARY, encoder_hidden_size=32, bos_token_id=1, sep_token_id=2, pad_token_id=0)
    vision = dict(layers, image_size=16, patch_size=8)
    return BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)).eval()


def tiny_vit() -> ViTModel:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    return ViTModel(config).eval()


def tiny_clip() -> CLIPModel:
    torch.manual_seed(0)
    layers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = dict(layers, vocab_size=VOCABULARY + 3, max_position_embeddings=20, eos_token_id=SEP, bos_token_id=CLS)
    vision = dict(layers, image_size=32, patch_size=8)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()


def tiny_whisper() -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=16,
        max_source_positions=50,
        max_target_positions=24,
        decoder_start_token_id=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return WhisperForConditionalGeneration(config).eval()
