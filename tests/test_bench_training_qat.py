"""The benchmark of training for few bits: what it runs, and what it makes of figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bench_figures import bench

from hf_shrink.pipeline.recipes import load_recipe

qat = bench("training_qat")


def result(task: str, variant: str, seed: int, f1: float) -> dict[str, Any]:
    more = {"accuracy": f1, "loss": 1.0, "weight_bytes": 10, "cpu_seconds": 2.0}
    return {"task": task, "variant_name": variant, "seed": seed, "f1": f1, **more}


def test_recipes_can_be_read() -> None:
    for recipe, _ in qat.VARIANTS.values():
        assert recipe is None or load_recipe(recipe).quantize is not None


def test_names() -> None:
    assert len(qat.names([0, 1], None)) == 2 * len(qat.TASKS) * len(qat.VARIANTS)
    assert qat.names([0], ["none"]) == []
    assert qat.names([3], ["digits:qat-w?"]) == [f"digits:qat-w{bits}:3" for bits in (8, 4, 3, 2)]
    assert set(qat.names([0], ["plays"])) == {f"plays:{variant}:0" for variant in qat.VARIANTS}
    with pytest.raises(ValueError, match="names no run"):
        qat.names([0], ["plays:w5"])


def test_losses_are_means_over_the_seeds_that_both_have() -> None:
    rows = [
        result("plays", "dense", 0, 0.90),
        result("plays", "dense", 1, 0.80),
        result("plays", "qat-w4", 0, 0.89),
        result("plays", "qat-w4", 1, 0.81),
        result("plays", "qat-w4", 2, 0.10),
        result("digits", "qat-w4", 0, 0.10),
    ]
    summary = qat.summarise({str(i): row for i, row in enumerate(rows)})
    assert summary["plays:qat-w4"]["seeds"] == [0, 1]
    assert summary["plays:qat-w4"]["f1_points_lost"] == 0.0
    assert summary["plays:dense"]["f1"] == pytest.approx(0.85)
    assert "digits:qat-w4" not in summary


def test_nothing_to_run_shows_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert qat.main(["--only", "none", "--output", str(tmp_path / "r.json")]) == 0
    assert "macro F1" in capsys.readouterr().out
    assert qat.main(["--only", "nonsense", "--output", str(tmp_path / "r.json")]) == 2
