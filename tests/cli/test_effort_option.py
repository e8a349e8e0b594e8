"""`--effort` on the command line, and how `plan` shows what it stands for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import tiny_llama, tiny_tokenizer

from hf_shrink.cli import main
from hf_shrink.recipe.effort import EFFORTS, written_out

SMALL = ["--set=calibration.samples=4", "--set=calibration.length=16", "--quiet"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("effort") / "source"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("how", [["--effort", "{}"], ["--set", "quantize.effort={}"]])
def test_plan_shows_what_an_effort_stands_for(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], effort: str, how: list[str]
) -> None:
    path = tmp_path / "plan.json"
    arguments = [word.format(effort) for word in how]
    assert main(["plan", str(source), *arguments, "--json", str(path), *SMALL]) == 0
    printed = capsys.readouterr().out
    assert f"effort {effort} = {written_out(EFFORTS[effort])}\n" in printed
    assert f"W4A16 g32 symmetric by {EFFORTS[effort]['method']}" in printed  # 32 divides the tiny widths
    assert ("are tuned" in printed) == ("tune" in EFFORTS[effort])
    plan = json.loads(path.read_text())
    assert plan["effort"] == effort
    assert plan["method"] == EFFORTS[effort]["method"]
    assert plan["tune"] == EFFORTS[effort].get("tune", {})


def test_set_changes_what_effort_left_open(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(source), "--effort=fast", "--set=quantize.scheme=W3A16", "--quiet"]) == 0
    assert "W3A16 g32 symmetric by rtn" in capsys.readouterr().out


def test_run_with_an_effort(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["run", str(source), "--effort", "fast", "--output", str(out), "--evaluation=none", "--quiet"]
    assert main(arguments) == 0
    record = json.loads((out / "shrink.json").read_text())
    assert record["plan"]["method"] == "rtn"
    assert record["plan"]["effort"] == "fast"
    assert record["report"]["calibration"] == {}  # no data was used


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--effort", "bst"], "did you mean 'best'"),
        (["--effort", "fast", "--recipe", "prune-width"], "no quantize step"),
        (["--effort", "fast", "--set", "quantize.method=gptq"], "either effort or method"),
        (["--effort", "fast", "--recipe", "PLAN"], "not a plan"),
    ],
)
def test_bad_efforts_are_one_line_and_nothing_is_written(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text("{}")
    words = [str(plan) if word == "PLAN" else word for word in arguments]
    assert main(["run", str(source), *words, "--output", str(tmp_path / "out"), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
