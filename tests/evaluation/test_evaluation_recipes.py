"""From what a user writes to settings, and from a text file to figures."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import TEXT, tiny_llama, tiny_tokenizer

from hf_shrink.errors import CalibrationError, RecipeError
from hf_shrink.evaluation import evaluate_model
from hf_shrink.evaluation.recipes import TaskRecipe, evaluation_spec, recipe_names
from hf_shrink.evaluation.tasks import TASKS
from hf_shrink.recipe import EvaluationSpec
from hf_shrink.resources import recipes_folder


def test_names_paths_and_files(tmp_path):
    assert {"self", "text-file", "summarisation", "speech"} < set(recipe_names())
    assert evaluation_spec("self") == EvaluationSpec(data="self", samples=16, length=512)
    assert evaluation_spec("some/novel.txt") == EvaluationSpec(data="some/novel.txt", samples=40, length=512)
    assert evaluation_spec("wikitext") == EvaluationSpec(data="wikitext")
    own = tmp_path / "own.yaml"
    own.write_text("data: novel.txt\nmetrics: [perplexity]\nsamples: 3")
    assert evaluation_spec(own) == EvaluationSpec(data="novel.txt", metrics=("perplexity",), samples=3)
    own.write_text("kind: text\ndataset: somewhere")
    assert evaluation_spec(own) == EvaluationSpec(data=str(own)), "a data recipe is data, not settings"
    own.write_text("sample: 3")
    with pytest.raises(RecipeError, match="did you mean 'samples'"):
        evaluation_spec(own)
    with pytest.raises(RecipeError, match="cannot read"):
        evaluation_spec(tmp_path / "missing.yaml")


def test_every_built_in_recipe_is_valid_and_says_what_it_is_for():
    for name in recipe_names():
        spec = evaluation_spec(name)
        text = (recipes_folder("evaluation") / f"{name}.yaml").read_text()
        assert text.startswith("# ")
        if isinstance(spec, TaskRecipe):
            assert spec.dataset and spec.split and "ows of yours" in text
            task = TASKS.build(spec.task, spec.options)
            assert set(spec.columns) <= set(task.roles)


def test_a_text_file_is_cut_into_independent_windows(tmp_path):
    """The protocol of the comparison tables: windows in order, the first token of each not predicted."""
    path = tmp_path / "novel.txt"
    path.write_text(TEXT)
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    spec = EvaluationSpec(samples=4, length=24, batch_size=3)
    result = evaluate_model(model, path, tokenizer=tokenizer, spec=spec)
    assert result["tokens"] == 4 * 23 and result["context"] == 24
    ids = tokenizer(TEXT, return_tensors="pt", add_special_tokens=False).input_ids[0]
    expected = []
    for window in ids[: len(ids) // 24 * 24].view(-1, 24)[:4]:
        with torch.no_grad():
            logits = model(window[None]).logits[0, :-1].double()
        expected.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item())
    assert result["model"]["perplexity"]["value"] == pytest.approx(math.exp(sum(expected) / (4 * 23)), rel=1e-5)
    assert "novel.txt" in result["data"]


def test_texts_are_data_too():
    spec = EvaluationSpec(samples=2, length=16)
    result = evaluate_model(tiny_llama(), [TEXT], tokenizer=tiny_tokenizer(), spec=spec)
    assert result["tokens"] == 2 * 15
    with pytest.raises(CalibrationError):
        evaluate_model(tiny_llama(), 3, tokenizer=tiny_tokenizer())
