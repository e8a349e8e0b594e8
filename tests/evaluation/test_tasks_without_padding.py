"""Tasks with tokenizers that have no token to pad with, or another one than the model knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from perturbing import perturbed
from tiny import TEXT, tiny_llama, tiny_tokenizer
from tokenizers import Tokenizer
from transformers import (
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hf_shrink.evaluation import evaluate_model

WORDS = TEXT.split()[:20]
TEXTS = [" ".join(WORDS[start : start + count]) for start, count in ((0, 2), (1, 9), (4, 3), (2, 14), (7, 1), (9, 6))]


def without_padding() -> PreTrainedTokenizerFast:
    inner = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
    inner.no_padding()  # which an earlier call may have left in it
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    assert tokenizer.pad_token_id is None
    return tokenizer


def model_of(cls: type[PreTrainedModel], **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = tiny_llama(num_hidden_layers=2).config
    config.update({"initializer_range": 0.3, **changes})
    return cls(config).eval()


@pytest.mark.parametrize("known", [None, 5], ids=["unknown to the model", "another of the model"])
@pytest.mark.parametrize("padding", [False, True])
def test_classes_are_those_of_each_text_alone(padding: bool, known: int | None) -> None:
    """The head takes the last token that is not the padding that the config names."""
    tokenizer = tiny_tokenizer() if padding else without_padding()
    model = model_of(LlamaForSequenceClassification, num_labels=5, pad_token_id=known)
    with torch.no_grad():
        best = [int(model(**without_padding()(text, return_tensors="pt")).logits.argmax()) for text in TEXTS]
    assert len(set(best)) > 1
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, best, strict=True)]
    assert evaluate_model(model, rows, tokenizer=tokenizer)["model"]["accuracy"]["value"] == 1
    assert evaluate_model(model, rows[:1], tokenizer=tokenizer)["model"]["accuracy"]["value"] == 1


SCORED = [{"sentence1": text, "sentence2": text[::-1], "score": place} for place, text in enumerate(TEXTS)]
FOUND = [{"query": text, "document": text[:9]} for text in TEXTS]
TAGGED = [{"tokens": text.split(), "tags": [len(word) % 2 for word in text.split()]} for text in TEXTS]
ANSWERED = [{"question": "what", "context": TEXT[start:], "answers": [TEXT[start : start + 9]]} for start in (0, 500)]
TAGS = {"id2label": {0: "O", 1: "B-X"}, "label2id": {"O": 0, "B-X": 1}}


@pytest.mark.parametrize(
    ("cls", "changes", "rows"),
    [
        (LlamaModel, {}, SCORED),
        (LlamaModel, {}, FOUND),
        (LlamaForTokenClassification, TAGS, TAGGED),
        (LlamaForQuestionAnswering, {}, ANSWERED),  # in windows of unequal lengths
    ],
    ids=["similarity", "retrieval", "tags", "stretches"],
)
def test_figures_are_those_with_padding(
    cls: type[PreTrainedModel], changes: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    dense = model_of(cls, **changes)
    asked = {"baseline": dense, "spec": {"length": 64}}
    found = evaluate_model(perturbed(dense), rows, tokenizer=without_padding(), **asked)
    expected = evaluate_model(perturbed(dense), rows, tokenizer=tiny_tokenizer(), **asked)
    for side in ("model", "baseline"):
        assert found[side].keys() == expected[side].keys() and found["model"]
        for name, figure in found[side].items():
            assert figure["value"] == pytest.approx(expected[side][name]["value"], abs=1e-5), name
