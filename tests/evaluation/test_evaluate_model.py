"""evaluate_model against slow float64 references, on every kind of model."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from datasets import Dataset
from perturbing import perturbed, windows
from tiny import VOCABULARY, tiny_llama, tiny_tokenizer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from hf_shrink.errors import CalibrationError, RecipeError
from hf_shrink.evaluation import evaluate_model, for_report

METRICS = ("perplexity", "kl_divergence", "top1_agreement")
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def reference(dense_logits, small_logits, labels):
    """Perplexity, KL and agreement from (n, classes) logits and (n,) labels, in float64 by their definitions."""
    p, q = (torch.softmax(logits.double(), -1) for logits in (dense_logits, small_logits))
    divergence = (p * (p.log() - q.log())).sum(-1).mean().item()
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    nll = [-math.log(q[i, label].item()) for i, label in enumerate(labels.tolist())]
    return math.exp(sum(nll) / len(nll)), divergence, agreement


def check(result, expected):
    for name, value in zip(METRICS, expected, strict=True):
        assert result["model"][name]["value"] == pytest.approx(value, rel=1e-5), name


def test_a_perfect_copy_has_no_divergence():
    dense = tiny_llama()
    result = evaluate_model(copy.deepcopy(dense), [{"input_ids": windows()}], baseline=dense)
    assert result["model"]["kl_divergence"]["value"] == 0
    assert result["model"]["top1_agreement"]["value"] == 1
    assert result["model"]["perplexity"] == result["baseline"]["perplexity"]
    assert result["excess_loss"] == {"value": 0, "low": 0, "high": 0}


def test_causal_equals_the_float64_reference():
    dense = tiny_llama()
    small = perturbed(dense)
    batches = [windows(3, 20, 0), windows(2, 33, 1)]
    result = evaluate_model(small, [{"input_ids": ids} for ids in batches], baseline=dense)
    logits = []
    for model in (dense, small):
        with torch.no_grad():
            logits.append(torch.cat([model(row[None]).logits[0, :-1] for ids in batches for row in ids]))
    labels = torch.cat([row[1:] for ids in batches for row in ids])
    check(result, reference(*logits, labels))
    assert result["tokens"] == 3 * 19 + 2 * 32
    assert (result["sequences"], result["context"]) == (5, 33)
    for figure in result["model"].values():
        assert figure["low"] < figure["value"] < figure["high"]
    json.dumps(result, allow_nan=False)


def test_chunks_and_single_rows_give_the_same(monkeypatch):
    dense = tiny_llama()
    small, data = perturbed(dense), [{"input_ids": windows()}]
    whole = evaluate_model(small, data, baseline=dense)
    monkeypatch.setattr("hf_shrink.evaluation.divergence.CHUNK", {"cpu": 7 * VOCABULARY, "accelerator": 7 * VOCABULARY})
    monkeypatch.setattr("hf_shrink.evaluation.batches.LOGITS", {"cpu": 1, "accelerator": 1})
    forwards = []
    small.register_forward_hook(lambda module, inputs, outputs: forwards.append(outputs.logits.shape[0]))
    pieces = evaluate_model(small, data, baseline=dense)
    assert forwards == [1, 1, 1]
    for name in METRICS:
        assert pieces["model"][name]["value"] == pytest.approx(whole["model"][name]["value"], rel=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side):
    dense = tiny_llama()
    small, ids = perturbed(dense), windows(1, 12)
    padding, ones, zeros = torch.zeros(1, 5, dtype=torch.long), torch.ones_like(ids), torch.zeros(1, 5).long()
    parts = ([padding, ids], [zeros, ones]) if side == "left" else ([ids, padding], [ones, zeros])
    padded = {"input_ids": torch.cat(parts[0], 1), "attention_mask": torch.cat(parts[1], 1)}
    padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp_min(0)
    bare = evaluate_model(small, [{"input_ids": ids}], baseline=dense)
    result = evaluate_model(small, [padded], baseline=dense)
    assert result["tokens"] == bare["tokens"] == 11
    for name in METRICS:
        assert result["model"][name]["value"] == pytest.approx(bare["model"][name]["value"], rel=1e-4)


def test_ignored_labels_do_not_count():
    dense = tiny_llama()
    small, ids = perturbed(dense), windows(2, 16)
    labels = ids.clone()
    labels[:, :10] = -100
    result = evaluate_model(small, [{"input_ids": ids, "labels": labels}], baseline=dense)
    with torch.no_grad():
        logits = [m(ids).logits[:, 9:-1].flatten(0, 1) for m in (dense, small)]
    check(result, reference(*logits, ids[:, 10:].flatten()))
    assert result["tokens"] == 12


def test_bfloat16_logits_are_compared_in_float32():
    dense = tiny_llama().bfloat16()
    small, ids = perturbed(dense), windows(2, 16)
    result = evaluate_model(small, [{"input_ids": ids}], baseline=dense)
    with torch.no_grad():
        logits = [m(ids).logits[:, :-1].flatten(0, 1) for m in (dense, small)]
    check(result, reference(*logits, ids[:, 1:].flatten()))


def bert(cls, **changes):
    torch.manual_seed(0)
    return cls(BertConfig(vocab_size=VOCABULARY, initializer_range=0.5, **SMALL, **changes)).eval()


def masking_tokenizer():
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    return tokenizer


def test_masked_model_is_scored_on_fixed_masked_tokens():
    model_class = BertForMaskedLM
    dense, tokenizer = bert(model_class), masking_tokenizer()
    dense.resize_token_embeddings(len(tokenizer))
    small, ids = perturbed(dense), windows(3, 20)
    attention = torch.ones_like(ids)
    attention[0, 12:] = 0
    seen = []
    small.register_forward_pre_hook(lambda m, a, kw: seen.append(kw["input_ids"]), with_kwargs=True)
    data = [{"input_ids": ids, "attention_mask": attention}]
    result = evaluate_model(small, data, baseline=dense, tokenizer=tokenizer)
    (masked,) = seen
    chosen = masked == tokenizer.mask_token_id
    assert chosen.sum(1).tolist() == [2, 3, 3] and not (chosen & (attention == 0)).any()
    with torch.no_grad():
        logits = [m(input_ids=masked, attention_mask=attention).logits for m in (dense, small)]
    perplexity = reference(logits[0][chosen], logits[1][chosen], ids[chosen])[0]
    real = attention.bool()
    check(result, (perplexity, *reference(logits[0][real], logits[1][real], ids[real])[1:]))
    evaluate_model(small, data, tokenizer=tokenizer, seed=5)
    assert torch.equal(seen[0], seen[1]), "the mask must not depend on the run"


def test_masked_model_without_mask_token_skips_perplexity():
    dense = bert(BertForMaskedLM)
    result = evaluate_model(perturbed(dense), [{"input_ids": windows()}], baseline=dense)
    assert set(result["model"]) == {"kl_divergence", "top1_agreement"}
    assert "mask token" in result["skipped"]["perplexity"]


def test_encoder_decoder_is_scored_on_the_decoder():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    dense = T5ForConditionalGeneration(config).eval()
    small, source, labels = perturbed(dense), windows(2, 9), windows(2, 7, 3)
    labels[1, 4:] = -100
    result = evaluate_model(small, [{"input_ids": source, "labels": labels}], baseline=dense)
    shifted = torch.cat([torch.zeros(2, 1).long(), labels[:, :-1].clamp_min(0)], 1)
    real = labels != -100
    with torch.no_grad():
        logits = [m(input_ids=source, decoder_input_ids=shifted).logits[real] for m in (dense, small)]
    check(result, reference(*logits, labels[real]))
    assert result["tokens"] == 11
    with pytest.raises(CalibrationError, match="add the target sequence as labels"):
        evaluate_model(small, [{"input_ids": source}], baseline=dense)


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_class_logits_are_compared(family):
    if family == "bert":
        dense, batch = bert(BertForSequenceClassification, num_labels=5), {"input_ids": windows(6, 10)}
    else:
        torch.manual_seed(0)
        sizes = {**SMALL, "image_size": 16, "patch_size": 8, "num_labels": 5, "initializer_range": 0.3}
        dense = ViTForImageClassification(ViTConfig(**sizes)).eval()
        batch = {"pixel_values": torch.randn(6, 3, 16, 16)}
    small = perturbed(dense)
    result = evaluate_model(small, [batch], baseline=dense)
    with torch.no_grad():
        logits = [m(**batch).logits for m in (dense, small)]
    _, divergence, agreement = reference(*logits, torch.zeros(6).long())
    assert result["model"]["kl_divergence"]["value"] == pytest.approx(divergence, rel=1e-4)
    assert result["model"]["top1_agreement"]["value"] == pytest.approx(agreement)
    assert "perplexity" in result["skipped"] and result["baseline"] == {}


def test_scores_are_compared_by_rank_and_not_as_classes():
    """Softmax over one class is always 1: any damage would look like a perfect copy."""
    dense, batch = bert(BertForSequenceClassification, num_labels=1), {"input_ids": windows(6, 10)}
    small = perturbed(dense, 0.3)
    result = evaluate_model(small, [batch], baseline=dense)
    with torch.no_grad():
        ranks = [model(**batch).logits[:, 0].argsort().argsort().double() for model in (dense, small)]
    expected = torch.corrcoef(torch.stack(ranks))[0, 1].item()
    assert expected < 0.99
    assert result["model"]["score_agreement"]["value"] == pytest.approx(expected)
    assert set(result["model"]) == {"score_agreement"} and result["sequences"] == 6
    assert "score_agreement is given instead" in result["skipped"]["kl_divergence"]
    with torch.no_grad():
        small.classifier.bias.fill_(float("nan"))
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        evaluate_model(small, [batch], baseline=dense)


def test_of_several_classes_each_is_compared_by_itself():
    """Softmax over classes that do not exclude each other compares what the model does not say."""
    head = {"num_labels": 5, "problem_type": "multi_label_classification"}
    dense, batch = bert(BertForSequenceClassification, **head), {"input_ids": windows(6, 10)}
    small = perturbed(dense, 0.3)
    result = evaluate_model(small, [batch], baseline=dense)["model"]
    with torch.no_grad():
        p, q = (model(**batch).logits.double().sigmoid() for model in (dense, small))
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean().item()
    assert result["kl_divergence"]["value"] == pytest.approx(expected, rel=1e-4)
    assert 0 < result["top1_agreement"]["value"] < 1
    assert result["top1_agreement"]["value"] == pytest.approx(((p > 0.5) == (q > 0.5)).double().mean().item())


def test_a_bare_encoder_is_compared_by_cosine():
    dense = bert(BertModel)
    small, ids = perturbed(dense), windows(2, 10)
    attention = torch.ones_like(ids)
    attention[1, 6:] = 0
    result = evaluate_model(small, [{"input_ids": ids, "attention_mask": attention}], baseline=dense)
    with torch.no_grad():
        a, b = (m(ids, attention_mask=attention).last_hidden_state[attention.bool()].double() for m in (dense, small))
    cosine = ((a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)).mean().item()
    assert result["model"]["cosine"]["value"] == pytest.approx(cosine, rel=1e-5)
    assert "cosine is given instead" in result["skipped"]["kl_divergence"]
    assert set(result["model"]) == {"cosine"}


def test_clip_is_compared_by_its_embeddings():
    torch.manual_seed(0)
    text = CLIPTextConfig(vocab_size=VOCABULARY, **SMALL, eos_token_id=2)
    vision = CLIPVisionConfig(**{**SMALL, "image_size": 16, "patch_size": 8})
    dense = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())).eval()
    batch = {"input_ids": windows(3, 8), "pixel_values": torch.randn(2, 3, 16, 16)}
    assert evaluate_model(dense, [batch], baseline=dense)["model"]["cosine"]["value"] == pytest.approx(1)
    assert evaluate_model(perturbed(dense), [batch], baseline=dense)["model"]["cosine"]["value"] < 0.999


def test_a_column_of_a_data_set_is_text():
    texts = [f"The tide leaves {i * 7 % 13} stones behind." for i in range(20)]
    model, spec = tiny_llama(), {"samples": 2, "length": 16}
    column = Dataset.from_dict({"text": texts, "label": list(range(20))})["text"]
    found, expected = (evaluate_model(model, d, tokenizer=tiny_tokenizer(), spec=spec) for d in (column, texts))
    assert found["model"] == expected["model"] and found["tokens"] == 30


def test_without_baseline_there_is_only_perplexity():
    result = evaluate_model(tiny_llama(), [{"input_ids": windows(1)}])
    assert set(result["model"]) == {"perplexity"}
    assert result["model"]["perplexity"]["low"] is None, "one sequence has no interval"
    assert "baseline" in result["skipped"]["kl_divergence"]


def test_other_vocabulary_skips_the_comparison():
    small = tiny_llama(vocab_size=VOCABULARY - 8)
    result = evaluate_model(small, [{"input_ids": windows() % 300}], baseline=tiny_llama())
    assert set(result["model"]) == {"perplexity"} and set(result["baseline"]) == {"perplexity"}
    assert "different numbers of classes" in result["skipped"]["top1_agreement"]


def test_modes_and_gradients_are_left_alone():
    model = tiny_llama().train()
    model.lm_head.eval()
    seen = []
    result = evaluate_model(model, [{"input_ids": windows()}] * 2, progress=lambda *done: seen.append(done))
    assert model.training and not model.lm_head.training and torch.is_grad_enabled()
    assert seen == [("evaluate", 1, 2), ("evaluate", 2, 2)]
    form = for_report(result, {"unit": "tokens/s"})
    assert form["compressed"] == result["model"] and form["speed"] == {"unit": "tokens/s"}


def test_errors_say_what_to_do():
    model, data = tiny_llama(), [{"input_ids": windows()}]
    with pytest.raises(RecipeError, match="did you mean 'perplexity'"):
        evaluate_model(model, data, metrics=["perplexty"])
    with pytest.raises(CalibrationError, match="no batches"):
        evaluate_model(model, [])
    with pytest.raises(CalibrationError, match="another tokenizer"):
        labels = windows().clone()
        labels[0, 3] = VOCABULARY
        evaluate_model(model, [{"input_ids": windows(), "labels": labels}])
    broken = tiny_llama()
    with torch.no_grad():
        broken.lm_head.weight[3] = float("nan")
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        evaluate_model(broken, data)
