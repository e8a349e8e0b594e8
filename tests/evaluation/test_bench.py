"""A checkpoint beside its dense model: what is measured and what is said, not how fast this machine is."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny import VOCABULARY, tiny_llama
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from hf_shrink import shrink
from hf_shrink.errors import ArchitectureError, CheckpointError
from hf_shrink.evaluation import Workload, bench, bench_checkpoint, memory
from hf_shrink.evaluation.made_up import made_up_inputs
from hf_shrink.evaluation.memory import Load, measure_memory
from hf_shrink.reporting.speed_plot import write_speed_plot
from hf_shrink.reporting.speed_table import plain_speed
from hf_shrink.speed_report import Memory, SpeedReport

RECIPE = {"steps": [{"quantize": {"method": "rtn", "scheme": "W4A16", "group_size": 16}}]}
FEW = Workload(prompt=4, new=3, prefill=9, repeats=2)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "dense"
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(dense: Path) -> Path:
    """Compressed, with a record that names its dense model."""
    folder = dense.parent / "small"
    model = shrink(type(tiny_llama()).from_pretrained(dense), RECIPE, progress=False)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def report(small: Path) -> SpeedReport:
    return bench_checkpoint(small, workload=FEW, memory=False, threads=1)


def test_the_record_names_the_dense_model(report: SpeedReport) -> None:
    assert list(report.models) == ["dense float32", "dense bfloat16", "compressed"]
    assert [model.dtype for model in report.models.values()] == ["float32", "bfloat16", "float32"]
    float32, bfloat16, compressed = (model.weight_bytes for model in report.models.values())
    assert float32 == pytest.approx(2 * bfloat16, rel=0.01)  # rotary tables stay in float32
    assert compressed < float32
    assert report.notes == []
    assert report.models["dense float32"].kernels == {}
    assert sum(report.models["compressed"].kernels.values()) == 4 * 7
    assert "Kernels of compressed: " in plain_speed(report)
    assert report.threads == 1
    assert report.workload["prefill"] == 9
    ratio = report.ratio("decode", "compressed", "dense float32")
    assert ratio * report.models["dense float32"].timings["decode"].per_second.median == pytest.approx(
        report.models["compressed"].timings["decode"].per_second.median
    )


def test_threads_are_as_they_were(small: Path) -> None:
    before = torch.get_num_threads()
    with pytest.raises(CheckpointError), bench._threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise CheckpointError
    assert torch.get_num_threads() == before


def test_json_says_it_all_and_is_read_again(report: SpeedReport) -> None:
    text = json.dumps(report.to_dict())
    again = SpeedReport.from_dict(json.loads(text))
    assert again == report
    body = json.loads(text)
    assert body["format"] == 1
    assert body["about"].keys() == {"date", "versions", "hardware"}
    decode = body["models"]["compressed"]["timings"]["decode"]
    assert decode.keys() == {
        *("unit", "amount", "seconds", "cpu_seconds"),
        *("per_second", "per_cpu_second", "median_seconds"),
    }
    assert decode["per_second"]["low"] <= decode["per_second"]["median"] <= decode["per_second"]["high"]


def test_the_table_and_the_plot(report: SpeedReport, tmp_path: Path) -> None:
    text = plain_speed(report)
    assert text.isascii()
    for words in ("Decode", "First token", "Prefill", "tokens/s", "compressed against dense bfloat16: decode"):
        assert words in text
    assert "Resident" not in text
    report.models["compressed"] = type(report.models["compressed"])(
        **{**vars(report.models["compressed"]), "memory": Memory(1_000_000, 3_000_000, 2_000_000, 4_000_000)}
    )
    assert "2 MB" in plain_speed(report)
    assert write_speed_plot(tmp_path / "speed.png", report).read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in write_speed_plot(tmp_path / "speed.svg", report).read_bytes()


def test_without_a_dense_model_it_is_measured_alone(small: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(small, tmp_path / "alone")
    (alone / "shrink.json").unlink()
    report = bench_checkpoint(alone, workload=FEW, memory=False)
    assert list(report.models) == ["compressed"]
    assert "measured alone" in report.notes[0]
    assert "Note: " in plain_speed(report)
    record = json.loads((small / "shrink.json").read_text())
    (alone / "shrink.json").write_text(json.dumps({**record, "source": "somewhere/else"}))
    (note,) = bench_checkpoint(alone, workload=FEW, memory=False).notes
    assert "somewhere/else" in note
    assert "baseline" in note


def test_a_dense_model_that_does_not_fit_is_left_out(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bytes_of_one = sum(p.numel() * 2 for p in tiny_llama().parameters())
    monkeypatch.setattr(bench, "available_bytes", lambda: int(1.2 * bytes_of_one))
    report = bench_checkpoint(small, workload=FEW, memory=False)
    assert list(report.models) == ["dense bfloat16", "compressed"]
    assert "dense float32" in report.notes[0]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own(small: Path) -> None:
    ballast = bytearray(b"x" * 300_000_000)  # of this process, not of the measured one
    taken = measure_memory(Load(str(small)))
    assert len(ballast) > taken.peak >= taken.used > 0
    assert taken.peak >= taken.loading_peak >= taken.loaded > 0


def test_a_process_that_ends_early_says_why(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for end, reason in (("raise SystemExit('it broke')", "it broke"), ("os.kill(os.getpid(), 9)", "too little memory")):
        monkeypatch.setattr(memory, "_CHILD", f"import os; {end}")
        with pytest.raises(CheckpointError, match=reason):
            measure_memory(Load(str(small)))


def test_memory_of_an_accelerator_is_that_of_the_one_in_use(monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    asked: list[object] = []
    for name, value in (("memory_allocated", 5), ("max_memory_allocated", 7)):
        monkeypatch.setattr(torch.accelerator, name, lambda device=None, value=value: asked.append(device) or value)
    real = memory.load_measured
    monkeypatch.setattr(memory, "load_measured", lambda folder, dtype, device: real(folder, dtype, "cpu"))
    taken = memory._measure(Load(str(small), device="meta:1", threads=1))
    assert asked == ["meta:1"] * 2
    assert (taken.device, taken.device_peak) == (5, 7)


def test_a_model_that_does_not_generate(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    BertModel(config).save_pretrained(tmp_path)
    report = bench_checkpoint(tmp_path, baseline=tmp_path, dense_dtypes=["float32"], workload=FEW, memory=False)
    text = plain_speed(report)
    assert "passes/s" in text
    assert "Decode" not in text
    assert report.ratio("long forward", "compressed", "dense float32") > 0


def test_positions_behind_a_padding_row_are_counted() -> None:
    """RoBERTa's way: of 66 rows 64 are positions."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = RobertaModel(RobertaConfig(vocab_size=VOCABULARY, max_position_embeddings=66, **sizes)).eval()
    inputs = made_up_inputs(model, 80)
    assert inputs["input_ids"].shape == (1, 64)
    with torch.no_grad():
        model(**inputs)


@pytest.mark.slow
def test_compiled_decoding_makes_one_graph(small: Path) -> None:
    report = bench_checkpoint(small, dense_dtypes=(), workload=FEW, memory=False, compiled=True)
    assert list(report.models) == ["compressed", "compressed, compiled"]


def test_what_is_not_there_is_refused(small: Path) -> None:
    with pytest.raises(CheckpointError, match="/nowhere"):
        bench_checkpoint("/nowhere")
    with pytest.raises(CheckpointError, match="quantized already"):
        bench_checkpoint(small, baseline=small)
    with pytest.raises(ArchitectureError, match="'nonsense'"):
        bench_checkpoint(small, device="nonsense")
