"""The training benchmark: which runs are meant, what is summed up, and one tiny run of the real thing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_figures import bench

training = bench("training")


def result(task: str, variant: str, seed: int, f1: float) -> dict[str, object]:
    figures = {"accuracy": f1, "f1": f1, "parameters": 10, "block_parameters": 8, "speedup": 2.0}
    return {"variant": f"{task}:{variant}:{seed}", "task": task, "variant_name": variant, "seed": seed, **figures}


def test_runs_are_named_by_task_variant_and_globs() -> None:
    assert len(training.names([0, 1], None)) == 2 * len(training.TASKS) * len(training.VARIANTS)
    assert training.names([3], ["digits:gradual", "plays:d*"]) == ["plays:dense:3", "digits:gradual:3"]
    assert training.names([0], ["none"]) == []
    with pytest.raises(ValueError, match="names no run"):
        training.names([0], ["digit"])


def test_losses_are_means_over_the_seeds_that_both_have() -> None:
    runs = [
        result("digits", "dense", 0, 0.9),
        result("digits", "dense", 1, 0.8),
        result("digits", "gradual", 0, 0.88),
        result("digits", "gradual", 2, 0.1),  # no dense model of this seed
    ]
    summary = training.summarise({str(run["variant"]): run for run in runs})
    assert summary["digits:gradual"]["f1_points_lost"] == pytest.approx(2.0)
    assert summary["digits:gradual"]["seeds"] == [0] and summary["digits:dense"]["seeds"] == [0, 1]
    assert "plays:dense" not in summary


def test_results_of_other_settings_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    assert training.main(["--only", "none", "--output", str(path)]) == 0
    training.Store(path, {"threads": 2, "window": training.WINDOW}).write({})
    assert training.main(["--only", "none", "--threads", "1", "--output", str(path)]) == 2
    assert "another protocol" in capsys.readouterr().err
    assert json.loads(path.read_text())["results"] == []


def test_plays_are_split_by_play() -> None:
    tasks = bench("training_tasks")
    found = list(tasks.plays())
    assert {label for _, _, label in found} == {0, 1}
    held_out = [passage for out, passage, _ in found if out]
    assert 0.2 < len(held_out) / len(found) < 0.4
    assert not set(held_out) & {passage for out, passage, _ in found if not out}
    assert max(len(passage.split()) for passage in held_out) < 120
