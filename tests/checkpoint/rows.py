"""One model for every row of the table of formats, and what stock transformers is expected to make of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from tiny import tiny_llama
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from hf_shrink.checkpoint.save import bind
from hf_shrink.ops.grid import min_max_grid, quantize
from hf_shrink.plan import BlockPlan, Plan, Scheme, StackPlan
from hf_shrink.quantization.base import QuantizedWeight
from hf_shrink.runtime.embedding import CompressedEmbedding
from hf_shrink.runtime.linear import CompressedLinear
from hf_shrink.surgery import apply_structure

IDS = [[3, 40, 5, 60, 7, 8, 90, 10, 11, 120, 13, 14]]
W8, W4, W3, W2 = (Scheme(bits, group_size=16) for bits in (8, 4, 3, 2))
W4_ASYMMETRIC = Scheme(4, symmetric=False, group_size=16)
W3_CHANNEL_ASYMMETRIC = Scheme(3, symmetric=False, strategy="channel", group_size=None)


W8A8 = Scheme(8, True, "channel", None, "int", 8)
FP8 = Scheme(8, True, "channel", None, "float")


def channel(bits: int) -> Scheme:
    return Scheme(bits, strategy="channel", group_size=None)


def tensor(bits: int, symmetric: bool = True) -> Scheme:
    return Scheme(bits, symmetric=symmetric, strategy="tensor", group_size=None)


def inner_linears(model: nn.Module) -> list[str]:
    """Every Linear and Conv1D with a parent, so that no head is among them."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and n not in ("lm_head", "")]


def pack(model: PreTrainedModel, schemes: dict[str, Scheme]) -> PreTrainedModel:
    """Round every named weight onto its grid, put the packed module in its place, and bind."""
    for path, scheme in schemes.items():
        module = model.get_submodule(path)
        weight = module.weight.detach()
        weight = weight.T.contiguous() if isinstance(module, Conv1D) else weight
        scheme = scheme.for_width(weight.shape[1])
        grid = min_max_grid(weight, scheme, weight.dtype)
        solved = QuantizedWeight(quantize(weight, grid), grid, 0.0)
        if isinstance(module, nn.Embedding):
            model.set_submodule(path, CompressedEmbedding.from_quantized(solved, module.padding_idx))
        else:
            bias = getattr(module, "bias", None)
            model.set_submodule(path, CompressedLinear.from_quantized(solved, bias))
    bind(model)
    return model


def all_linears(scheme: Scheme) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        model = tiny_llama()
        return pack(model, dict.fromkeys(inner_linears(model), scheme))

    return build


def llama(extra: dict[str, Scheme], scheme: Scheme = W8, **changes: Any) -> Callable[[], PreTrainedModel]:
    """Every inner Linear by `scheme`, and more by `extra`."""

    def build() -> PreTrainedModel:
        model = tiny_llama(**changes)
        return pack(model, {**dict.fromkeys(inner_linears(model), scheme), **extra})

    return build


def mixed(*schemes: Scheme) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        model = tiny_llama()
        return pack(model, {path: schemes[i % len(schemes)] for i, path in enumerate(inner_linears(model))})

    return build


def pruned(channels: dict[int, int], scheme: Scheme | None = None) -> Callable[[], PreTrainedModel]:
    """A Llama whose blocks keep that many channels, without or with quantization."""

    def build() -> PreTrainedModel:
        model = tiny_llama()
        blocks = {index: BlockPlan(channels=tuple(range(count))) for index, count in channels.items()}
        apply_structure(model, Plan("llama", {"decoder": StackPlan((0, 1, 2, 3), blocks)}))
        schemes = {} if scheme is None else dict.fromkeys(inner_linears(model), scheme)
        return pack(model, schemes)

    return build


def without_parts(scheme: Scheme | None = None) -> Callable[[], PreTrainedModel]:
    """A Llama without one attention and one MLP."""

    def build() -> PreTrainedModel:
        model = tiny_llama()
        blocks = {1: BlockPlan(removed=("attention",)), 2: BlockPlan(removed=("mlp",))}
        apply_structure(model, Plan("llama", {"decoder": StackPlan((0, 1, 2, 3), blocks)}))
        return pack(model, {} if scheme is None else dict.fromkeys(inner_linears(model), scheme))

    return build


def gpt2(only: str = "") -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=320, n_embd=48, n_layer=2, n_head=3, n_positions=64, bos_token_id=1, eos_token_id=2
        )
        model = GPT2LMHeadModel(config).eval()
        spread(model)
        return pack(model, {path: W8 for path in inner_linears(model) if path.endswith(only)})

    return build


def t5(head: bool, output: Scheme = W8, scheme: Scheme = W8) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=320, d_model=48, d_kv=16, d_ff=80, num_layers=2, num_heads=3, decoder_start_token_id=0
        )
        model = T5ForConditionalGeneration(config).eval()
        spread(model)
        paths = [*inner_linears(model), *(["lm_head"] if head else [])]
        return pack(model, {path: output if path.endswith("wo") else scheme for path in paths})

    return build


def t5_head_w8a8() -> PreTrainedModel:
    model = t5(head=False, output=W8A8, scheme=W8A8)()
    return pack(model, {"lm_head": W8A8})


def bert_head(scheme: Scheme = W8) -> PreTrainedModel:
    """A head quantized apart from its embedding, whose bias is tied as well."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=320, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3
    )
    model = BertForMaskedLM(config).eval()
    spread(model)
    return pack(model, dict.fromkeys(inner_linears(model), scheme))


def clip_text() -> PreTrainedModel:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=320,
        hidden_size=48,
        intermediate_size=80,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=3,
        eos_token_id=2,
    )
    model = CLIPTextModelWithProjection(config).eval()
    spread(model)
    return pack(model, dict.fromkeys(inner_linears(model), W4))


def spread(model: nn.Module) -> None:
    """Larger weights, and biases that are not zero, so that a wrong or fresh tensor shows in the logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)


@dataclass(frozen=True)
class Row:
    """`stock`: "yes", "dequantize" (with that key), or part of a reason why not."""

    build: Callable[[], PreTrainedModel]
    stock: str


ROWS: dict[str, Row] = {
    "w8 group": Row(all_linears(W8), "yes"),
    "w4 group": Row(all_linears(W4), "yes"),
    "w3 group": Row(all_linears(W3), "yes"),
    "w2 group": Row(all_linears(W2), "yes"),
    "w8 channel": Row(all_linears(channel(8)), "yes"),
    "w4 channel": Row(all_linears(channel(4)), "yes"),
    "w3 channel": Row(all_linears(channel(3)), "yes"),
    "w2 channel": Row(all_linears(channel(2)), "yes"),
    "w4 tensor": Row(all_linears(tensor(4)), "yes"),
    "w4 tensor asymmetric": Row(all_linears(tensor(4, symmetric=False)), "yes"),
    "mixed": Row(mixed(W8, W4, channel(3), tensor(8)), "yes"),
    "w4 group asymmetric": Row(all_linears(W4_ASYMMETRIC), "dequantize"),
    "w3 channel asymmetric": Row(all_linears(W3_CHANNEL_ASYMMETRIC), "dequantize"),
    "mixed asymmetric": Row(llama({"lm_head": W8}, W4_ASYMMETRIC), "asymmetric"),
    "embedding": Row(llama({"model.embed_tokens": W8}), "dequantize"),
    "embedding alone": Row(lambda: pack(tiny_llama(), {"model.embed_tokens": channel(8)}), "dequantize"),
    "embedding asymmetric": Row(llama({"model.embed_tokens": W4_ASYMMETRIC}, W4_ASYMMETRIC), "dequantize"),
    "embedding of another scheme": Row(llama({"model.embed_tokens": W8}, W4), "embedding"),
    "embedding with tied head": Row(
        llama({"model.embed_tokens": W8, "lm_head": W8}, tie_word_embeddings=True), "dequantize"
    ),
    "embedding with tied head of another scheme": Row(
        llama({"model.embed_tokens": W8, "lm_head": W8}, W4, tie_word_embeddings=True), "embedding"
    ),
    "embedding apart from tied head": Row(llama({"model.embed_tokens": W8}, tie_word_embeddings=True), "dequantize"),
    "head apart from tied embedding": Row(llama({"lm_head": W4}, tie_word_embeddings=True), "yes"),
    "tied, neither packed": Row(llama({}, tie_word_embeddings=True), "yes"),
    "evenly pruned": Row(pruned(dict.fromkeys(range(4), 64)), "yes"),
    "evenly pruned, w4": Row(pruned(dict.fromkeys(range(4), 64), W4), "yes"),
    "unevenly pruned": Row(pruned({1: 64, 3: 48}), "shape"),
    "unevenly pruned, w4": Row(pruned({1: 64, 3: 48}, W4), "shape"),
    # 78 and 80 columns of 4 bits fill the same 10 words: only the out dimension of up and gate tells.
    "unevenly pruned by a hair, w4": Row(pruned({1: 78}, channel(4)), "shape"),
    "without parts": Row(without_parts(), "shape"),
    "without parts, w4": Row(without_parts(W4), "shape"),
    "conv1d": Row(gpt2(), "Conv1D"),
    "square conv1d": Row(gpt2("attn.c_proj"), "Conv1D"),
    "t5": Row(t5(head=False), "dequantize"),
    "t5, two schemes": Row(t5(head=False, output=W4), "initialised"),
    "t5, head apart": Row(t5(head=True), "dequantize"),
    "clip text": Row(clip_text, "yes"),
    "bert, head apart": Row(bert_head, "yes"),
    "mixed with w8a8 and fp8": Row(mixed(W8A8, W4, FP8), "yes"),
    "w8a8": Row(all_linears(W8A8), "yes"),
    "fp8": Row(all_linears(FP8), "yes"),
    "w8a8, inputs without zero points": Row(all_linears(replace(W8A8, activation_symmetric=True)), "yes"),
    "bert, w8a8": Row(lambda: bert_head(W8A8), "yes"),
    "bert, fp8": Row(lambda: bert_head(FP8), "yes"),
    "t5, w8a8": Row(t5(head=False, output=W8A8, scheme=W8A8), "no inputs"),
    "t5, fp8": Row(t5(head=False, output=FP8, scheme=FP8), "dequantize"),
    "fp8 embedding with tied head": Row(
        llama({"model.embed_tokens": FP8, "lm_head": FP8}, FP8, tie_word_embeddings=True), "dequantize"
    ),
    "t5, w8a8, head apart": Row(t5_head_w8a8, "no inputs"),
    "unevenly pruned, w8a8": Row(pruned({1: 64, 3: 48}, W8A8), "shape"),
    "w8a8 with embedding": Row(llama({"model.embed_tokens": channel(8)}, W8A8), "embedding"),
}
