"""Bad input on the command line: exit 2, one clear line on stderr, nothing written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TEXT, tiny_llama, tiny_tokenizer

from hf_shrink.cli import main


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str], *expected: str) -> None:
    """The command exits with 2, says one line that has all of `expected`, and prints nothing on stdout."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        raise SystemExit(main(arguments))
    captured = capsys.readouterr()
    assert left.value.code == 2, captured.err
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    for text in expected:
        assert text in lines[0]


def run(source: Path, *more: str) -> list[str]:
    return ["run", str(source), "--output", str(source.parent / "out"), "--quiet", *more]


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _quantized(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))


def _pickled(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")


def _cut_short(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def _with_nan(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_no_config, "config.json"),
        (_quantized, "quantized already (gptq)"),
        (_pickled, "safetensors"),
        (_cut_short, "download it again"),
        (_with_nan, "model.layers.2.mlp.up_proj.weight"),
    ],
)
def test_damaged_sources(
    source: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], expected: str
) -> None:
    damage(source)
    fails(capsys, run(source), expected)
    assert sorted(p.name for p in source.parent.iterdir()) == ["source"]


def test_missing_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, run(tmp_path / "absent"), "absent")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--recipe", "w4a61"], "did you mean 'w4a16'"),
        (["--set", "quantize.grup_size=64"], "did you mean 'group_size'"),
        (["--set", "quantize.method=gtpq"], "did you mean 'gptq'"),
        (["--set", "quantize.scheme=W9A16"], "did you mean 'W8A16'"),
        (["--recipe", "prune-width", "--set", "prune.ratio=1.5"], "below 1"),
        (["--recipe", "prune-width", "--set", "prune.ratio=0.99"], "ratio"),
        (["--recipe", "prune-depth", "--set", "prune.blocks=4"], "block"),
        (["--evaluation", "no-such-data"], "no-such-data"),
        (["--calibration", "no-such-data"], "no-such-data"),
        (["--calibration", "no-such-file.txt"], "no-such-file.txt"),
    ],
)
def test_bad_requests(source: Path, capsys: pytest.CaptureFixture[str], more: list[str], expected: str) -> None:
    small = ["--set", "calibration.samples=2", "--set", "calibration.length=16"]
    small += ["--set", "evaluation.samples=2", "--set", "evaluation.length=16"]
    fails(capsys, run(source, *more, *small), expected)
    assert not (source.parent / "out").exists()


def test_a_figure_that_cannot_be_drawn_is_refused_before_anything_is_computed(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "model.safetensors").unlink()  # not looked at yet
    fails(capsys, ["plan", str(source), "--figure", str(source / "plan.svg")], "figures are .png or .html")


def test_text_calibration_without_a_tokenizer(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = source.parent / "text.txt"
    text.write_text(TEXT)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (source / name).unlink(missing_ok=True)
    fails(capsys, run(source, "--calibration", str(text), "--evaluation", "none"), "tokenizer")


@pytest.mark.parametrize(("content", "expected"), [("", "empty"), ("two words", "tokens")])
def test_empty_or_short_data(source: Path, capsys: pytest.CaptureFixture[str], content: str, expected: str) -> None:
    text = source.parent / "text.txt"
    text.write_text(content)
    fails(capsys, run(source, "--calibration", str(text), "--evaluation", "none"), "text.txt", expected)


def test_output_that_is_not_empty_is_left_alone(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = source.parent / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    fails(capsys, run(source), "--overwrite")
    assert (out / "mine.txt").read_text() == "keep me"


def test_output_that_cannot_be_written(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocked = source.parent / "file"
    blocked.write_text("a file, not a folder")
    fails(capsys, ["run", str(source), "--output", str(blocked / "out"), "--quiet"], "file")
    if os.geteuid() != 0:  # root writes anywhere
        closed = source.parent / "closed"
        closed.mkdir(mode=0o500)
        fails(capsys, ["run", str(source), "--output", str(closed / "out"), "--quiet"], "closed")


def test_bench_is_refused_before_anything_is_measured(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, ["bench", "/nowhere"], "/nowhere")
    fails(capsys, ["bench", str(source), "--baseline", "/nowhere"], "/nowhere")
    fails(capsys, ["bench", str(source), "--new", "1"], "new is 1")
    fails(capsys, ["bench", str(source), "--device", "nonsense"], "nonsense")
    fails(capsys, ["bench", str(source), "--json", "/nowhere/at/all.json"], "/nowhere/at")
    fails(capsys, ["bench", str(source), "--plot", "speed.gif"], ".png")


def test_usage_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["run"], ["rnu"], ["run", "x", "--output", "y", "--seed", "z"]):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
