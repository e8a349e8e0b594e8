"""The speed benchmark: rounds that go on where they stopped, verdicts by hand, and its workers on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_figures import HARDWARE, bench
from tiny import VOCABULARY, tiny_llama

speed, targets, models, peers = map(bench, ("speed", "speed_targets", "speed_models", "speed_peers"))
SMALL, LARGE = targets.SMALL, targets.LARGE


def part(rate: float, cpu_rate: float | None = None, size: int = 100) -> dict[str, Any]:
    """One process's figures: decoding at `rate`, `size` bytes of everything."""
    timing = {"unit": "token", "amount": 10, "seconds": [10 / rate], "cpu_seconds": [10 / (cpu_rate or rate)]}
    memory = {"loaded": size, "loading_peak": size, "used": size, "peak": size}
    tasks = {"decode": timing, "first token": timing, "prefill": timing}
    return {"timings": tasks, "memory": memory, "weight_bytes": size, "dtype": "bfloat16", "kernels": {}}


def result(subject: str, name: str, kind: str, *parts: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "variant": f"{subject}/{name}",
        "subject": subject,
        "name": name,
        "kind": kind,
        "compiled": name.endswith("-compiled"),
        "threads": 1,
        "rounds": list(parts),
        "about": {"commit": "abc", "hardware": HARDWARE},
        **changes,
    }


def judged(*results: dict[str, Any], of: str) -> dict[str, Any]:
    summary = targets.summarise({r["variant"]: r for r in results})
    return {verdict["target"]: verdict for verdict in summary[of]["targets"]}


def test_figures_are_medians_over_all_rounds() -> None:
    found = targets.figures(result(SMALL, "ours", "ours", part(10, 5), part(30, 15), part(20, 10)))
    assert found["decode"] == {"median": 20, "low": 10, "high": 30}
    assert found["decode per CPU second"]["median"] == 10
    assert found["first token"]["median"] == 500  # milliseconds
    assert found["rounds"] == 3


def test_targets_against_dense_peers_and_llama_cpp() -> None:
    found = judged(
        result(SMALL, "dense-float32", "dense", part(12)),
        result(SMALL, "dense-bfloat16", "dense", part(10)),
        result(SMALL, "ours", "ours", part(23, 12, size=114), packed_bytes=100),
        result(SMALL, "torchao-int4", "peer", part(16)),
        result(SMALL, "torchao-int4-compiled", "peer", part(50)),
        result(SMALL, "llama.cpp-q4_1", "llama.cpp", part(99, 15)),
        result(SMALL, "llama.cpp-q4_0", "llama.cpp", part(99, 20)),
        of=f"{SMALL}/ours",
    )
    assert {name: verdict["met"] for name, verdict in found.items()} == {
        "decode >= 2.2 x dense-bfloat16": True,
        "decode >= 1.3 x fastest peer": True,
        "decode per CPU second >= 0.75 x llama.cpp-q4_1": True,
        "decode per CPU second >= 0.75 x llama.cpp-q4_0": False,
        "prefill >= 1 x fastest dense": True,
        "weights <= 1.15 x packed": True,
        "loaded <= 1.15 x packed": True,
        "used <= 1.15 x packed": True,
    }
    assert found["decode >= 1.3 x fastest peer"]["against"] == f"{SMALL}/torchao-int4"
    assert found["prefill >= 1 x fastest dense"]["ratio"] == pytest.approx(23 / 12, abs=0.001)


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    ours = result(LARGE, "ours", "ours", part(20, size=200), packed_bytes=100)
    stranger = result(LARGE, "torchao-int4", "peer", part(1), about={"commit": "", "hardware": {"cores": 64}})
    found = judged(ours, stranger, of=f"{LARGE}/ours")
    assert found["decode >= 3 x dense-bfloat16"]["met"] is None
    assert "other hardware" in found["decode >= 1.3 x fastest peer"]["reason"]
    assert found["used <= 1.15 x packed"]["met"] is False


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line whose models are there, two peers installed, and where nothing is measured."""

    def prepare(subject: str, what: str, cache: Path) -> Path:
        folder = cache / f"{subject}-{what}"
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_text(subject)
        return folder

    def run(a: Any, subject: str, tool: Any) -> dict[str, Any]:
        return {f"{subject}/{name}": {**part(10), "threads": a.threads} for name, _ in speed.variants_of(tool)}

    monkeypatch.setattr(speed, "prepare", prepare)
    monkeypatch.setattr(speed, "run", run)
    for name in ("torchao", "llamacpp"):
        python = tmp_path / "home" / name / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.symlink_to(sys.executable)
    common = ["--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "out.json"), "--threads", "1"]
    return [*common, "--subjects", SMALL, "--peers-home", str(tmp_path / "home")]


def measured(words: list[str]) -> dict[str, Any]:
    content = json.loads(Path(words[words.index("--output") + 1]).read_text())
    return {r["variant"]: r for r in content["results"]}


def test_processes_take_turns_and_go_on_where_they_stopped(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*words, "--peers-dir", str(tmp_path), "--rounds", "2"]
    assert speed.main([*words, "--only", "ours"]) == 0
    assert {v: len(r["rounds"]) for v, r in measured(words).items()} == {
        f"{SMALL}/{name}": 2 for name in ("dense-float32", "dense-bfloat16", "ours", "ours-compiled")
    }
    capsys.readouterr()
    assert speed.main([*words, "--only", "torchao-int4", "llama.cpp-q4_1"]) == 0
    printed = capsys.readouterr()
    order = [line.split()[1] + line.split()[-2] for line in printed.err.splitlines()]
    assert order == [f"{SMALL}/{name},{n}" for n in (1, 2) for name in ("torchao-int4", "llama.cpp-q4_1")]
    assert "not installed" in printed.out
    assert measured(words)[f"{SMALL}/torchao-int4"]["about"]["versions"].keys() == {
        "python",
        "torchao",
        "torch",
        "transformers",
    }
    assert speed.main([*words, "--rounds", "3", "--only", "ours"]) == 0
    assert len(measured(words)[f"{SMALL}/ours"]["rounds"]) == 3
    assert speed.main([*words, "--only", "none", "--rerun", "ours"]) == 0
    assert len(measured(words)[f"{SMALL}/ours"]["rounds"]) == 2


def test_without_peers_only_ours_runs(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert speed.main([*words, "--dry-run"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("round")] == [
        f"round {n} {SMALL}/ours" for n in (1, 2, 3)
    ]


def test_another_protocol_is_refused_and_a_failure_told(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert speed.main([*words, "--rounds", "1"]) == 0
    assert speed.main([*words, "--new", "64"]) == 2
    assert "never mixed" in capsys.readouterr().err

    def fail(*_: Any) -> None:
        raise RuntimeError("it broke")

    monkeypatch.setattr(speed, "run", fail)
    assert speed.main([*words, "--rounds", "3"]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("it broke") == 1  # not tried again in later rounds
    assert "failed" in captured.out
    assert len(measured(words)[f"{SMALL}/ours"]["rounds"]) == 1


def test_the_peers_worker_measures_any_folder(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    job = {"tool": "compressed-tensors", "folder": str(tmp_path), "group": 16, "compiled": False}
    found = peers.measure({**job, "threads": 1, "prompt": 4, "new": 3, "prefill": 6, "repeats": 2})
    assert {task: (t["amount"], len(t["seconds"])) for task, t in found["timings"].items()} == {
        "decode": (2, 2),
        "first token": (4, 2),
        "prefill": (6, 2),
    }
    assert found["memory"]["peak"] >= found["memory"]["used"]
    assert targets.figures({"rounds": [found]})["decode"]["median"] > 0


def test_gguf_holds_what_the_checkpoint_does(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = tiny_llama(**sizes, num_hidden_layers=1)
    model.save_pretrained(tmp_path / "dense")
    models.write_gguf(tmp_path / "dense", tmp_path / "x.gguf", "Q4_0")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert found["token_embd.weight"].tensor_type.name == found["output.weight"].tensor_type.name == "Q8_0"
    assert found["blk.0.ffn_down.weight"].tensor_type.name == "Q4_0"
    head = torch.tensor(gguf.quants.dequantize(found["output.weight"].data, gguf.GGMLQuantizationType.Q8_0))
    assert head.shape == (VOCABULARY, 64)
    torch.testing.assert_close(head, model.lm_head.weight.detach(), atol=0.01, rtol=0.01)
    down = torch.tensor(gguf.quants.dequantize(found["blk.0.ffn_down.weight"].data, gguf.GGMLQuantizationType.Q4_0))
    torch.testing.assert_close(down, model.model.layers[0].mlp.down_proj.weight.detach(), atol=0.12, rtol=0)
    query = torch.tensor(gguf.quants.dequantize(found["blk.0.attn_q.weight"].data, gguf.GGMLQuantizationType.Q4_0))
    first_head = model.model.layers[0].self_attn.q_proj.weight.detach()[:16]
    torch.testing.assert_close(query[:16:2], first_head[:8], atol=0.12, rtol=0)  # pairs of halves become neighbours
    torch.testing.assert_close(query[1:16:2], first_head[8:], atol=0.12, rtol=0)
