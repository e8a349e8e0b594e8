"""`--budget`, `--sweep` and `--figure` on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_llama, tiny_tokenizer

from hf_shrink.cli import main
from hf_shrink.evaluation.size import stored_bytes
from hf_shrink.front import Front
from hf_shrink.plan import Plan

SMALL = [
    "--set=calibration.samples=8",
    "--set=calibration.length=24",
    "--set=evaluation.samples=4",
    "--set=evaluation.length=24",
    "--quiet",
]
SEARCH = ["--set=search.group_size=16", "--set=search.generations=0", "--set=search.bits=[4,8]", "--effort=fast"]


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_SHRINK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("budget") / "source"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_plan_prints_a_line_a_block_and_run_carries_it_out(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, figure, out = tmp_path / "plan.json", tmp_path / "plan.html", tmp_path / "out"
    asked = ["--budget", "40%", *SEARCH, *SMALL]
    assert main(["plan", str(source), *asked, "--json", str(path), "--figure", str(figure)]) == 0
    printed = capsys.readouterr().out
    for word in ("KV groups", "channels", "predicted KL", "found by a search for a budget", "effort fast"):
        assert word in printed
    assert "Compression plan" in figure.read_text()
    assert Plan.from_json(path).search["limits"].keys() == {"bytes"}
    assert main(["plan", str(source), "--recipe", str(path), "--quiet"]) == 0
    lines = [line for line in printed.splitlines() if not line.startswith("note: search:") and line != str(figure)]
    assert capsys.readouterr().out.splitlines() == lines
    arguments = ["run", str(source), "--recipe", str(path), "--output", str(out), "--evaluation=none", "--quiet"]
    assert main(arguments) == 0
    assert stored_bytes(out) <= 0.4 * stored_bytes(source)


def test_a_sweep_prints_and_draws_a_front(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, figure = tmp_path / "front.json", tmp_path / "front.html"
    asked = ["--sweep", "40%,60%", *SEARCH, *SMALL, "--json", str(path), "--figure", str(figure)]
    assert main(["plan", str(source), *asked]) == 0
    printed = capsys.readouterr().out
    front = Front.from_json(path)
    assert [point.name for point in front.points if point.kind == "plan"] == ["40%", "60%"]
    assert all(point.name in printed for point in front.points)
    assert "KL divergence to the dense model" in figure.read_text()
    assert json.loads(path.read_text())["resource"] == "bytes"
    assert main(["run", str(source), "--recipe", f"{path}:41%", "--output", str(tmp_path / "out")]) == 2
    assert "there are plans for 40%, 60%" in capsys.readouterr().err
    run = ["run", str(source), "--recipe", f"{path}:40%", "--output", str(tmp_path / "out"), "--evaluation=none"]
    assert main([*run, "--quiet"]) == 0
    assert stored_bytes(tmp_path / "out") <= 0.4 * stored_bytes(source)
    page = (tmp_path / "out/report.html").read_text()
    for shown in ("plan is that of 40%", "What each block is worth", "W8 g16", '<th scope="row">query</th>'):
        assert shown in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "30%", "--recipe", "w4a16"], "the recipe w4a16 has steps; leave --recipe"),
        (["--budget", "3%"], "the least that this search reaches is"),
        (["--budget", "latncy:30%"], "did you mean 'latency'"),
        (["--budget", "30%", "--budget", "20%"], "already"),
        (["--sweep", "30%,latency:40%"], "over one resource"),
        (["--sweep", "30%,50%", "--budget", "latency:60%"], "would leave out that of --budget"),
        (["--sweep", "latency:60%", "--recipe", "budget-bytes-30"], "nothing would limit bytes"),
        (["--budget", "30%", "--figure", "nowhere/plan.html"], "no folder nowhere"),
        (["--set", "budget.bytes=30%"], "no budget to search for"),
    ],
)
def test_bad_budgets_are_one_line_on_stderr(
    source: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["plan", str(source), *arguments, "--quiet"]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
