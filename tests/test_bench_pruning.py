"""The pruning benchmark: what it runs, and what it makes of figures."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
from bench_figures import bench
from tiny import TEXT, tiny_llama, tiny_tokenizer

from hf_shrink.recipe import Recipe

pruning, figures = bench("pruning"), bench("pruning_figures")
DENSE = {"novel": 30.0, "plays": 20.0}


def result(name: str, loss: float, kind: str = "ours", **more: Any) -> dict[str, Any]:
    perplexity = {text: value * math.exp(loss) for text, value in DENSE.items()}
    return {"variant": name, "name": name.partition(":")[0], "kind": kind, "perplexity": perplexity, **more}


def test_recipes_can_be_read_and_both_halves_make_the_whole() -> None:
    for variant in pruning.variants([0.1, 0.2, 0.3], 1):
        if variant.steps is None:
            continue
        recipe = Recipe.from_dict({"portable": variant.portable, "steps": list(variant.steps)})
        left = 1.0
        for step in (recipe.prune("depth"), recipe.prune("width")):
            if step is not None:
                left *= 1 - (step.ratio if step.blocks is None else step.blocks / pruning.BLOCKS)
        assert left == pytest.approx(1 - variant.ratio), variant.id


def test_losses_are_compared_at_the_same_ratio_and_targets_are_judged() -> None:
    rows = [
        result("dense", 0.0, "dense"),
        result("wanda:20%", 0.4, "reference"),
        result("torchpruning:20%", 0.5, "reference"),
        result("block_influence:10%", 0.1, "reference"),
        result("obs:20%", 0.1),
        result("obs-no-refit:20%", 0.3),
        result("evolve:20%", 0.2),
        result("kl_greedy:20%", 0.2, speed={"decode": {"speedup": 1.25}}),
    ]
    summary = figures.summarise({row["variant"]: row for row in rows})
    assert summary["losses"]["obs:20%"]["ratio"]["novel"] == pytest.approx(0.25)
    assert summary["losses"]["obs:20%"]["compared_with"] == 2
    assert "ratio" not in summary["losses"]["wanda:20%"]
    verdicts = {name: verdict["met"] for name, verdict in summary["targets"].items()}
    assert list(verdicts.values()) == [True, False, True, True]
    assert figures.summarise({}) == {}


def test_only_and_rerun(tmp_path: Path) -> None:
    words = ["--data", str(tmp_path), "--model", str(tmp_path), "--ratios", "0.2"]
    names = [
        v.id
        for v in pruning.chosen(pruning.arguments([*words, "--only", "obs*", "--rerun", "wanda"]), {"wanda:20%": 1})
    ]
    assert names == ["dense", "wanda:20%", "obs:20%", "obs-no-refit:20%", "obs-uneven:20%"]
    assert pruning.chosen(pruning.arguments([*words, "--only", "none"]), {}) == []
    with pytest.raises(ValueError, match="names no variant"):
        pruning.chosen(pruning.arguments([*words, "--only", "nothing"]), {})


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    data, model = tmp_path / "data", tmp_path / "model"
    data.mkdir()
    for name in ("emma.txt", "mansfieldpark.txt"):
        (data / name).write_text(TEXT * 40)
    tiny_llama().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    monkeypatch.setattr(pruning, "LENGTH", 32)
    monkeypatch.setattr(pruning, "HELD_OUT_WINDOWS", 2)
    monkeypatch.setattr(pruning, "write_plays", lambda path: data / "mansfieldpark.txt")
    monkeypatch.setattr(pruning, "run_fresh", lambda command, threads: bench("ours").measure(_job(command)))
    words = ["--data", str(data), "--model", str(model), "--samples", "2", "--threads", "1"]
    words += ["--ratios", "0.2", "--output", str(tmp_path / "found.json"), "--only", "wanda", "torchpruning"]
    assert pruning.main(words) == 0
    shown = capsys.readouterr()
    assert "wanda:20%" in shown.out and "torchpruning is left out" in shown.err
    monkeypatch.setattr(pruning, "run_fresh", lambda *_: sys.exit("nothing is left to run"))
    assert pruning.main([*words[:-1]]) == 0
    assert pruning.main([*words[:-3], "--samples", "3", "--only", "none"]) == 2


def _job(command: list[str]) -> dict[str, Any]:
    import json

    job: dict[str, Any] = json.loads(command[-1])
    return {**job, "speed": False}
