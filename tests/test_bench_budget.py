"""The budget benchmark: what it compares, how it judges, and that it runs only what is missing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from bench_figures import bench

from hf_shrink.recipe import Recipe

budget, figures = bench("budget"), bench("budget_figures")
BF16 = 269_045_204  # bytes of SmolLM2-135M


def variants() -> list[Any]:
    return list(budget.variants([0.22, 0.3, 0.45], BF16, 10, "balanced"))


def test_rivals_fit_the_same_budget_as_well_as_they_can() -> None:
    assert [budget.uniform_bits(int(share * BF16)) for share in (0.22, 0.3, 0.45)] == [(3, 4), (4, 6), (6, 8)]
    # 2 bits in groups of 64 with zero points: 2 + (16 + 2) / 64
    assert budget.stored(64, 2) == pytest.approx(64 * (2 + 18 / 64) / 8)
    assert budget.stored(64, 3) == pytest.approx(64 * (3 + 16 / 64) / 8)
    for variant in variants():
        if variant.recipe is not None:
            recipe = Recipe.from_dict(variant.recipe)
            assert recipe.dtype == "bfloat16"
            assert (recipe.budget is not None) == (variant.kind in ("ours", "job"))
    by_id = {variant.id: variant for variant in variants()}
    blocks = 8 * (by_id["autoscheme:30%"].budget - budget.stored(budget.EMBEDDING, 6)) / budget.IN_BLOCKS
    assert by_id["autoscheme:30%"].bits == pytest.approx(blocks, abs=0.01)
    assert by_id["pruned:45%"].recipe["steps"][0]["prune"]["ratio"] == pytest.approx(0.169, abs=0.002)


def test_only_what_is_missing_or_named_runs() -> None:
    every = variants()
    ids = [v.id for v in budget.chosen(every, {"dense": {}}, ["ours", "uniform:22%"], ["dense"])]
    assert ids == ["dense", "ours:22%", "uniform:22%", "ours:30%", "ours:45%"]
    assert budget.chosen(every, {}, ["none"], []) == []
    assert [v.id for v in budget.chosen(every, {}, ["30%"], [])][:2] == ["dense", "ours:30%"]
    with pytest.raises(ValueError, match="names no variant"):
        budget.chosen(every, {}, ["mine"], [])


def result(name: str, kind: str, loss: float, size: int = 90) -> dict[str, Any]:
    point = name.partition(":")[2] or None
    perplexity = {"novel": 20 * math.exp(loss), "plays": 40 * math.exp(loss)}
    return {"kind": kind, "point": point, "perplexity": perplexity, "weight_bytes": size, "budget_bytes": 100}


def test_verdicts() -> None:
    results = {
        "dense": {**result("dense", "dense", 0.0), "point": None},
        "ours:30%": result("ours:30%", "ours", 0.03),
        "uniform:30%": result("uniform:30%", "rival", 0.05),
        "pruned:30%": result("pruned:30%", "rival", 0.5),
        "ours:45%": result("ours:45%", "ours", 0.03, size=101),
        "predictions": {"kind": "job", "point": None, "spearman": 0.95},
    }
    results["pruned:30%"]["perplexity_with_a_dense_table"] = {"novel": 20 * math.exp(0.4)}
    summary = figures.summarise(results)
    assert summary["excess_loss"]["uniform:30%"]["novel"] == pytest.approx(0.05)
    assert summary["excess_loss_with_a_dense_table"] == {"pruned:30%": {"novel": pytest.approx(0.4)}}
    verdicts = {(v["target"][:6], v["point"], v.get("text")): v for v in summary["targets"]}
    good = verdicts["excess", "30%", "novel"]
    assert good["met"]
    assert good["value"] == pytest.approx(0.6)
    assert good["against"] == "uniform:30%"
    assert verdicts["excess", "45%", "plays"]["met"] is None  # nothing to compare with
    assert verdicts["bytes ", "30%", None]["met"]
    assert verdicts["bytes ", "45%", None]["met"] is False
    assert verdicts["predic", None, None]["met"]
    assert verdicts["planni", None, None]["met"] is None
    assert figures.summarise({})["excess_loss"] == {}


def test_the_script_prints_what_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_SHRINK_CACHE", str(tmp_path))  # which main sets, put back
    monkeypatch.setattr(budget, "folder_bytes", lambda folder: 2 * BF16)
    model, data = tmp_path / "model", tmp_path / "data"
    for folder in (model, data):
        folder.mkdir()
    (model / "model.safetensors").write_bytes(b"0" * 100)
    (data / "emma.txt").write_text("text")
    (data / "mansfieldpark.txt").write_text("text")
    out = tmp_path / "budget.json"
    words = ["--data", str(data), "--model", str(model), "--output", str(out), "--shares", "0.3"]
    assert budget.main([*words, "--only", "none"]) == 0
    assert "not measured" in capsys.readouterr().out
    assert budget.main([*words, "--only", "mine"]) == 2
    out.write_text(json.dumps({"format": 0}))
    assert budget.main([*words, "--only", "none"]) == 2
    assert "not written by this version" in capsys.readouterr().err
