"""Perplexity over overlapping windows, and bits per byte, against plain computations."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import TEXT, tiny_llama, tiny_tokenizer
from tiny_readers import encoder_tokenizer, tiny_bert_mlm

from hf_shrink.calibration.data import CalibrationData
from hf_shrink.errors import CalibrationError, RecipeError
from hf_shrink.evaluation import evaluate_model
from hf_shrink.evaluation.windows import sliding
from hf_shrink.recipe import EvaluationSpec, Recipe

BOTH = ("perplexity", "bits_per_byte")


def plainly(model, ids: torch.Tensor, length: int, stride: int) -> float:
    """Summed negative log-likelihood of every token but the first, one token after the other, in float64."""
    total, start = 0.0, 0
    stops = [length, *range(length + stride, len(ids), stride), len(ids)]
    for stop in dict.fromkeys(stops):
        window = ids[stop - length : stop]
        with torch.no_grad():
            logits = model(window[None]).logits[0].double()
        for place in range(max(start, 1), stop):
            at = place - (stop - length)
            total -= logits[at - 1].log_softmax(-1)[ids[place]].item()
        start = stop
    return total


@pytest.mark.parametrize("stride", [24, 10, 1])
def test_every_token_is_scored_once_with_the_context_that_is_left(tmp_path, stride):
    path = tmp_path / "novel.txt"
    path.write_text(TEXT)
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    spec = EvaluationSpec(samples=3, length=24, batch_size=4, stride=stride)
    result = evaluate_model(model, path, tokenizer=tokenizer, spec=spec, metrics=BOTH)
    ids = tokenizer(TEXT, return_tensors="pt", add_special_tokens=False).input_ids[0][: 3 * 24]
    total = plainly(model, ids, 24, stride)
    if stride == 24:  # windows side by side: only the very first token has nothing before it inside its window
        assert result["tokens"] == 3 * 24 - 3
        return
    assert result["tokens"] == 3 * 24 - 1 and (result["context"], result["stride"]) == (24, stride)
    assert result["model"]["perplexity"]["value"] == pytest.approx(math.exp(total / 71), rel=1e-5)
    size = len(tokenizer.decode(ids).encode()) - len(tokenizer.decode(ids[:1]).encode())
    assert result["model"]["bits_per_byte"]["value"] == pytest.approx(total / math.log(2) / size, rel=1e-5)
    assert f"{stride} tokens apart" in result["data"]


def test_models_of_different_vocabularies_read_the_same_windows(tmp_path):
    """With one vocabulary in both places the figures are those of a plain comparison."""
    path = tmp_path / "novel.txt"
    path.write_text(TEXT)
    model, dense, tokenizer = tiny_llama(1), tiny_llama(), tiny_tokenizer()
    spec = EvaluationSpec(samples=3, length=24, batch_size=4, stride=10)
    given = {"baseline": dense, "tokenizer": tokenizer, "spec": spec, "metrics": BOTH}
    plain = evaluate_model(model, path, **given)
    apart = evaluate_model(model, path, baseline_tokenizer=tokenizer, **given)
    assert (apart["tokens"], apart["context"], apart["stride"]) == (plain["tokens"], 24, 10)
    for key in ("model", "baseline"):
        assert apart[key]["perplexity"]["value"] == pytest.approx(plain[key]["perplexity"]["value"], rel=1e-5)
    assert apart["model"]["bits_per_byte"]["value"] == pytest.approx(plain["model"]["bits_per_byte"]["value"], rel=1e-5)
    assert apart["excess_loss"]["value"] == pytest.approx(plain["excess_loss"]["value"], rel=1e-4)
    ids = torch.randint(3, 300, (1, 8))
    holes = {"input_ids": ids, "labels": torch.where(torch.arange(8) == 4, -100, ids)}
    with pytest.raises(CalibrationError, match="labels that are not those of overlapping windows"):
        evaluate_model(model, [holes], baseline=dense, tokenizer=tokenizer, baseline_tokenizer=tokenizer)


def test_special_tokens_stand_around_every_window():
    tokenizer = encoder_tokenizer()
    data = CalibrationData([{"input_ids": torch.tensor([[320, 5, 6, 7], [320, 8, 9, 10]])}], "tokens of a text")
    made = sliding(data, tokenizer, 2, 8)
    (batch,) = made.batches
    assert batch["input_ids"].tolist() == [[320, 5, 6, 7], [320, 7, 8, 9], [320, 8, 9, 10]]
    # The first text token is predicted from the special one before it.
    assert batch["labels"].tolist() == [[-100, 5, 6, 7], [-100, -100, 8, 9], [-100, -100, -100, 10]]


def test_bytes_count_characters_of_several_tokens():
    text = "Größe, naïveté, 東京と京都 und noch mehr davon. " * 6
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    spec = EvaluationSpec(samples=2, length=40)
    result = evaluate_model(model, [text], tokenizer=tokenizer, spec=spec, metrics=BOTH)
    nll = math.log(result["model"]["perplexity"]["value"]) * result["tokens"]
    size = nll / math.log(2) / result["model"]["bits_per_byte"]["value"]
    ids = tokenizer(text, add_special_tokens=False).input_ids[:80]
    # Windows may begin within a character, of which the tokenizer then makes a stand-in of three bytes.
    assert size == pytest.approx(len(tokenizer.decode(ids).encode()) - 2, abs=8)


def test_what_has_no_running_text_takes_no_stride(tmp_path):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    spec = EvaluationSpec(samples=2, length=16, stride=8)
    with pytest.raises(CalibrationError, match="running text"):
        evaluate_model(model, "self", tokenizer=tokenizer, spec=spec)
    with pytest.raises(CalibrationError, match="leave the stride out"):
        evaluate_model(tiny_bert_mlm(), [TEXT], tokenizer=encoder_tokenizer(), spec=spec)
    with pytest.raises(RecipeError, match="from 1 to length"):
        EvaluationSpec(length=16, stride=17)
    with pytest.raises(RecipeError, match="hf-shrink evaluate --stride"):
        Recipe.from_dict({"steps": [{"quantize": {}}], "evaluation": {"stride": 8}})


def test_bits_per_byte_need_a_tokenizer():
    result = evaluate_model(tiny_llama(), [{"input_ids": torch.randint(3, 300, (2, 12))}], metrics=BOTH)
    assert "pass tokenizer=" in result["skipped"]["bits_per_byte"]
