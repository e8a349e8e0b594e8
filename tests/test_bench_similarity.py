"""The sentence benchmark: recipes, pooling and cosines by hand, and a small run on MiniLM."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench_figures import bench

from hf_shrink.pipeline.recipes import load_recipe

similarity = bench("sentence_similarity")


def test_recipes_take_effort_and_scheme() -> None:
    recipe = load_recipe(similarity.recipe_of("best:W4A16", 64, 8))
    assert recipe.quantize is not None
    assert (recipe.quantize.effort, recipe.quantize.base_scheme().group_size) == ("best", 64)
    assert similarity.recipe_of("balanced:W8A8", 64, 8)["steps"] == [
        {"quantize": {"effort": "balanced", "scheme": "W8A8"}}
    ]
    with pytest.raises(ValueError, match="EFFORT:SCHEME"):
        similarity.recipe_of("best", 64, 8)


def test_embeddings_are_means_over_real_tokens() -> None:
    states = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]], [[5.0, 1.0], [9.0, 9.0], [9.0, 9.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = {"input_ids": torch.zeros(2, 3, dtype=torch.long), "attention_mask": mask}
    found = similarity.embed(lambda **_: SimpleNamespace(last_hidden_state=states), [batch, batch])
    assert found.tolist() == [[2.0, 4.0], [5.0, 1.0]] * 2
    assert found.dtype == torch.float64


def test_cosines_and_verdicts() -> None:
    dense = torch.eye(2).double()
    found = similarity.similarity(torch.tensor([[3.0, 0.0], [1.0, 1.0]]).double(), dense)
    assert found["smallest"] == pytest.approx(0.5**0.5)
    assert found["mean"] == pytest.approx((1 + 0.5**0.5) / 2)
    assert similarity.verdict("W4A16", 0.99) == {"target": 0.99, "met": True}
    assert similarity.verdict("W8A8", 0.9989) == {"target": 0.999, "met": False}
    assert similarity.verdict("W8A16", 0.5) == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--variants", "balanced:W9A9"], "unknown scheme"),
        (["--variants", "fast:W4A16", "bst:W4A16"], "did you mean 'best'"),
        (["--variants", "fast:W4A16", "--lines", "10000000"], "are needed"),
    ],
)
def test_what_cannot_be_run_is_found_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    path = tmp_path / "out.json"
    assert similarity.main([*words, "--threads", "1", "--output", str(path)]) == 2
    assert message in capsys.readouterr().err
    assert not path.exists()


def test_a_small_run(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    words = ["--variants", "fast:W8A16", "fast:W4A16", "--lines", "8", "--calibration-lines", "4", "--threads", "1"]
    assert similarity.main([*words, "--output", str(path)]) == 0
    content = json.loads(path.read_text())
    assert content["protocol"]["seed"] == 0
    assert content["versions"]["torch"] == torch.__version__
    eight, four = content["results"]
    assert 0.9 < four["cosine"]["mean"] < eight["cosine"]["mean"] < 1
    assert eight["cosine"]["mean"] > 0.999
    assert four["weight_bytes"] < eight["weight_bytes"] < content["dense_bytes"]
    assert four["target"] == 0.99
