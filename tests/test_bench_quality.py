"""The quality benchmark from its command line, with a tiny model for ours and a stand-in for the peers' runner."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from bench_figures import bench, result
from tiny import TEXT, tiny_llama, tiny_tokenizer

quality, ours = bench("quality"), bench("ours")
LOSSES = {"dense": 0.0, "balanced": 0.05, "best": 0.03, "fast": 0.3, "rtn": 0.3}

RUNNER = """
import json, os, pathlib, sys
if os.environ.get("FAKE_PEER_FAILS"): sys.exit("it broke")
value = lambda name: sys.argv[sys.argv.index(name) + 1]
texts = sys.argv[sys.argv.index("--heldout") + 1 : sys.argv.index("--samples")]
print(json.dumps({"peer": sys.argv[1], "bits": int(value("--bits")), "group": int(value("--group")),
    "symmetric": "--asymmetric" not in sys.argv, "seconds": 50.0, "peak_rss_mb": 1000, "threads": 1,
    "perplexity": {pathlib.Path(t).stem: 22.0 for t in texts}}))
"""


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line whose model and texts are there, and where ours is made up instead of measured."""
    data, model = tmp_path / "data", tmp_path / "model"
    data.mkdir()
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    for name in ("emma.txt", "mansfieldpark.txt"):
        (data / name).write_text(name)
    monkeypatch.setattr(quality, "CACHE", tmp_path / "cache")

    def made_up(a: Any, held_out: Any, variant: Any) -> dict[str, Any]:
        losses = {"novel": LOSSES[variant.name], "plays": LOSSES[variant.name]}
        body = result(variant.name, variant.kind, losses)
        loss = {"mansfieldpark": body["perplexity"]["plays"], "plays": body["perplexity"]["plays"]}
        return {**body, **variant.to_dict(), "perplexity": loss, "threads": a.threads}

    monkeypatch.setattr(quality, "run_ours", made_up)
    plain = dataclasses.replace(quality.PEERS["autoround"], own=None)  # as if the runner below knew it
    monkeypatch.setitem(quality.PEERS, "autoround", plain)
    peers = tmp_path / "peers"
    peers.mkdir()
    (peers / "run.py").write_text(RUNNER)
    python = tmp_path / "home" / "autoround" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    common = ["--data", str(data), "--model", str(model), "--threads", "1", "--output", str(tmp_path / "out.json")]
    return [*common, "--bits", "4", "--peers-dir", str(peers), "--peers-home", str(tmp_path / "home")]


def measured(words: list[str]) -> dict[str, Any]:
    content = json.loads(Path(words[words.index("--output") + 1]).read_text())
    return {r["variant"]: r for r in content["results"]} | {"summary": content["summary"]}


def test_ours_and_the_installed_peers_in_pieces(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert quality.main([*words, "--only", "balanced"]) == 0
    assert set(measured(words)) == {"dense", "balanced:W4g64", "summary"}
    capsys.readouterr()
    assert quality.main([*words, "--compare"]) == 0
    output = capsys.readouterr()
    for line in ("1/3 best:W4g64 ...", "2/3 fast:W4g64 ...", "3/3 autoround:W4g64 ..."):
        assert line in output.err
    assert "balanced:W4g64 ..." not in output.err
    for name in ("llmcompressor-gptq", "gptqmodel", "bitsandbytes-nf4", "torchao-int4", "quanto-int4"):
        assert name in output.out
    assert output.out.count("not installed") == 5
    assert "8 bits only" in output.out
    found = measured(words)
    assert found["summary"]["best:W4g64"]["best_peer"]["plays"] == "autoround:W4g64"
    assert found["autoround:W4g64"]["about"]["versions"]["torch"]

    def refuse(*_: Any) -> None:
        raise AssertionError("nothing is missing")

    monkeypatch.setattr(quality, "run_ours", refuse)
    assert quality.main([*words, "--compare"]) == 0
    assert quality.main([*words, "--only", "none"]) == 0


def test_rerun_measures_again_and_keeps_the_rest(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert quality.main(words) == 0
    before = measured(words)
    monkeypatch.setitem(LOSSES, "best", 0.02)
    monkeypatch.setitem(LOSSES, "fast", 0.9)
    assert quality.main([*words, "--rerun", "best"]) == 0
    after = measured(words)
    assert after["best:W4g64"] != before["best:W4g64"]
    assert after["fast:W4g64"] == before["fast:W4g64"]
    assert quality.main([*words, "--bits", "4", "3", "--only", "none", "--rerun", "best:W4g64"]) == 0
    assert measured(words).keys() == after.keys()  # nothing that is missing ran
    assert after["summary"]["best:W4g64"]["excess_loss"]["plays"] == pytest.approx(0.02)


@pytest.mark.parametrize("change", [["--samples", "4"], ["--seed", "1"], ["--heldout-samples", "2"]])
def test_another_protocol_is_refused_before_anything_runs(
    words: list[str], capsys: pytest.CaptureFixture[str], change: list[str]
) -> None:
    assert quality.main([*words, "--only", "dense"]) == 0
    capsys.readouterr()
    assert quality.main([*words, *change]) == 2
    assert "never mixed" in capsys.readouterr().err
    assert set(measured(words)) == {"dense", "summary"}


def test_another_model_or_text_is_refused(words: list[str], tmp_path: Path) -> None:
    assert quality.main([*words, "--only", "dense"]) == 0
    (tmp_path / "data" / "emma.txt").write_text("changed")
    assert quality.main(words) == 2
    (tmp_path / "data" / "emma.txt").write_text("emma.txt")
    assert quality.main([*words, "--only", "none"]) == 0
    (tmp_path / "model" / "model.safetensors").write_bytes(b"others")
    assert quality.main(words) == 2


def test_a_failing_peer_is_told_and_tried_again(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_PEER_FAILS", "1")
    assert quality.main([*words, "--compare", "--peers", "autoround", "--efforts", "best"]) == 1
    assert "failed" in capsys.readouterr().out
    assert set(measured(words)) == {"dense", "best:W4g64", "summary"}
    monkeypatch.delenv("FAKE_PEER_FAILS")
    assert quality.main([*words, "--compare", "--peers", "autoround", "--efforts", "best"]) == 0
    assert "autoround:W4g64" in measured(words)


def test_dry_run_prints_command_lines_and_runs_nothing(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quality.main([*words, "--compare", "--methods", "rtn", "--iters", "50", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[:3] == ["dense", "rtn:W4g64", "autoround-50:W4g64"]
    assert "--iters 50" in printed
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--compare", "--heldout-samples", "2"], "takes no --heldout-samples"),
        (["--peers", "nonsense"], "invalid choice"),
        (["--data", "/nowhere"], "is missing"),
    ],
)
def test_bad_options_end_before_anything_runs(
    words: list[str], capsys: pytest.CaptureFixture[str], change: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        quality.main([*words, *change])
    assert message in capsys.readouterr().err


def test_a_name_without_variant_ends_with_two(words: list[str]) -> None:
    assert quality.main([*words, "--only", "bets"]) == 2


def test_ours_is_measured_on_every_text(tmp_path: Path) -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name in ("emma", "novel", "plays"):
        (tmp_path / f"{name}.txt").write_text(TEXT)
    variant = bench("variants").Variant("rtn", "method", bench("variants").Setting(4, 16))
    job = {
        "model": str(tmp_path / "model"),
        "calibration": str(tmp_path / "emma.txt"),
        "held_out": [str(tmp_path / "novel.txt"), str(tmp_path / "plays.txt")],
        "samples": 2,
        "held_out_samples": 2,
        "length": 16,
        "threads": 1,
        "seed": 0,
    }
    dense = ours.measure({**job, "recipe": None})
    found = ours.measure({**job, "recipe": variant.recipe(2, 16)})
    assert dense["perplexity"].keys() == found["perplexity"].keys() == {"novel", "plays"}
    assert found["perplexity"]["novel"] == found["perplexity"]["plays"] != dense["perplexity"]["novel"]
    assert found["weight_bytes"] < dense["weight_bytes"]
    assert found["seconds_with_loading"] == pytest.approx(found["seconds"] + found["load_seconds"], abs=0.011)
    assert found["threads"] == dense["threads"] == 1
    assert json.loads(json.dumps(found)) == found
