"""Explanation fidelity against plain computations."""

from __future__ import annotations

import copy

import pytest
import torch
from perturbing import perturbed, windows
from scipy.stats import spearmanr
from tiny import tiny_llama, tiny_tokenizer
from tiny_readers import encoder_tokenizer, tiny_bert, tiny_t5, tiny_vit, tiny_whisper
from transformers import ViTForImageClassification

from hf_shrink.evaluation import evaluate_model
from hf_shrink.evaluation.tasks import Subject

BOTH = ("attribution_fidelity", "attention_fidelity")


def values(model, data, baseline, **options):
    result = evaluate_model(model, data, baseline=baseline, metrics=BOTH, **options)
    assert not result["skipped"]
    return [result["model"][name]["value"] for name in BOTH]


def test_a_copy_decides_for_the_same_reasons_and_another_model_does_not():
    dense, data = tiny_llama(), [{"input_ids": windows(3, 12)}]
    assert values(copy.deepcopy(dense), data, dense) == pytest.approx([1, 1])
    near, far = values(perturbed(dense, 0.02), data, dense), values(tiny_llama(seed=5), data, dense)
    assert all(1 > one > other for one, other in zip(near, far, strict=True))
    assert all(parameter.grad is None for parameter in dense.parameters())


def test_they_are_gradient_times_input_and_the_mean_map():
    dense = tiny_llama()
    small, ids = perturbed(dense), windows(1, 10)
    shares, maps = [], []
    choice = int(dense(ids).logits[0, -2].argmax())  # the last position with a label
    for model in (dense, small):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embedded).logits[0, -2].log_softmax(-1)[choice].backward()
        shares.append((embedded * embedded.grad).sum(-1)[0].abs().detach())
        eager = copy.deepcopy(model)
        eager.set_attn_implementation("eager")
        maps.append(torch.stack(eager(ids, output_attentions=True).attentions)[:, 0].mean((0, 1)).detach())
    attribution, attention = values(small, [{"input_ids": ids}], dense)
    assert attribution == pytest.approx(spearmanr(*shares).statistic, abs=1e-6)
    assert attention == pytest.approx(1 - (maps[0] - maps[1]).abs().sum(-1).mean().item() / 2, abs=1e-5)
    assert dense.config._attn_implementation != "eager", "the attention function is put back"


def vit_classifier():
    config = tiny_vit().config
    config.num_labels = 4
    return ViTForImageClassification(config).eval()


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (tiny_bert, {"input_ids": windows(2, 9), "attention_mask": torch.tensor([[1] * 9, [1] * 6 + [0] * 3])}),
        (vit_classifier, {"pixel_values": torch.randn(2, 3, 32, 32)}),
        (tiny_t5, {"input_ids": windows(2, 9), "decoder_input_ids": windows(2, 5)}),
        (tiny_whisper, {"input_features": torch.randn(2, 16, 100), "decoder_input_ids": windows(2, 5)}),
    ],
    ids=["bert", "vit", "t5", "whisper"],
)
def test_every_kind_of_input_is_explained(model, batch):
    dense = model()
    assert values(copy.deepcopy(dense), [batch], dense) == pytest.approx([1, 1], abs=1e-5)
    assert all(-1 <= value < 1 for value in values(perturbed(dense), [batch], dense))


def test_rows_are_made_into_inputs_again_only_where_decisions_are_explained(monkeypatch):
    texts = ["the tide goes out", "a child walks", "nobody counts the stones", "the sand"]
    rows = [{"sentence1": text, "sentence2": text[:9], "score": place} for place, text in enumerate(texts)]
    dense, tokenizer, made = tiny_bert(), encoder_tokenizer(), []
    padded = Subject.padded
    monkeypatch.setattr(Subject, "padded", lambda self, given, *rest: made.append(given) or padded(self, given, *rest))
    evaluate_model(dense, rows, tokenizer=tokenizer, metrics=("rank_correlation",))
    assert sum(map(len, made)) == 8
    given = [{"input_ids": tokenizer(text, return_tensors="pt").input_ids} for text in texts]
    expected = values(perturbed(dense), given, dense)
    assert values(perturbed(dense), rows, dense, tokenizer=tokenizer) == pytest.approx(expected, abs=1e-6)
    assert max(expected) < 1


def test_what_cannot_be_explained_is_said():
    data = [{"input_ids": windows(2, 8)}]
    result = evaluate_model(tiny_llama(), data, metrics=BOTH)
    assert result["skipped"] == dict.fromkeys(BOTH, "needs the dense model as baseline")
    other = tiny_llama(num_hidden_layers=2)
    assert "attention_fidelity" in evaluate_model(other, data, baseline=tiny_llama(), metrics=BOTH)["model"]
    apart = {"tokenizer": tiny_tokenizer(), "baseline_tokenizer": tiny_tokenizer()}
    result = evaluate_model(other, data, baseline=tiny_llama(), metrics=BOTH, **apart)
    assert "different tokens" in result["skipped"]["attribution_fidelity"]
    rows = [{"question": "what", "choices": ["sand", "rocks"], "answer": 0}]
    result = evaluate_model(other, rows, baseline=tiny_llama(), tokenizer=tiny_tokenizer(), metrics=BOTH)
    assert "several inputs for one answer" in result["skipped"]["attention_fidelity"]
