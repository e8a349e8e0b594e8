"""Seconds, bytes and memory as metrics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from perturbing import perturbed, windows
from tiny import tiny_llama, tiny_tokenizer
from tiny_readers import tiny_t5

from hf_shrink import shrink, shrink_checkpoint
from hf_shrink.errors import CheckpointError
from hf_shrink.evaluation import evaluate_model, unique_bytes
from hf_shrink.evaluation.machine import can_measure_memory
from hf_shrink.evaluation.memory import Load
from hf_shrink.pipeline import checkpointing, measuring
from hf_shrink.runtime.linear import CompressedLinear
from hf_shrink.speed_report import Memory

COSTS = ("latency", "weight_bytes", "peak_memory")
PACKED = {"steps": [{"quantize": {"method": "rtn", "group_size": 32}}], "evaluation": {"metrics": []}}


def test_both_models_are_weighed_and_timed():
    dense = tiny_llama(num_hidden_layers=2)
    small = perturbed(dense).bfloat16()
    result = evaluate_model(small, [{"input_ids": windows(2, 8)}], baseline=dense, metrics=COSTS)
    assert result["model"]["weight_bytes"]["value"] == unique_bytes(small)
    assert result["baseline"]["weight_bytes"]["value"] == unique_bytes(dense)
    for side in ("model", "baseline"):
        figure = result[side]["latency"]
        assert 0 < figure["low"] <= figure["value"] <= figure["high"] < 10
    assert "folder" in result["skipped"]["peak_memory"]


def test_a_packed_model_is_timed_as_it_is():
    """Its weights are unpacked once while it is measured on the data, which is quicker than the model is."""
    model = shrink(tiny_llama(hidden_size=96, num_hidden_layers=2), PACKED, progress=False)
    seen: dict[int, set[bool]] = {}

    def look(linear, inputs):
        seen.setdefault(inputs[0].shape[-2], set()).add("forward" in vars(linear) or linear.kept_dense is not None)

    for module in model.modules():
        if isinstance(module, CompressedLinear):
            module.register_forward_pre_hook(look)
    result = evaluate_model(model, [{"input_ids": windows(2, 90)}], metrics=("perplexity", "latency"))
    assert result["model"].keys() == {"perplexity", "latency"}
    assert seen == {90: {True}, 128: {False}}


def test_a_decoder_behind_an_encoder_is_timed():
    batch = {"input_ids": windows(2, 9), "decoder_input_ids": windows(2, 5)}
    assert evaluate_model(tiny_t5(), [batch], metrics=("latency",))["model"]["latency"]["value"] > 0


@pytest.fixture
def loads(monkeypatch) -> list[Load]:
    """What is loaded in a process of its own, which there is none of."""
    if not can_measure_memory():
        pytest.skip("only Linux counts memory so")
    loads: list[Load] = []

    def counted(load: Load) -> Memory:
        loads.append(load)
        return Memory(1, 2, 3, 4)

    monkeypatch.setattr("hf_shrink.evaluation.costs.measure_memory", counted)
    return loads


def peak(model):
    return evaluate_model(model, [{"input_ids": windows(1, 8)}], metrics=("peak_memory",))


def test_memory_is_counted_in_a_process_of_its_own(tmp_path, loads, monkeypatch):
    tiny_llama(num_hidden_layers=2).save_pretrained(tmp_path)
    model = type(tiny_llama()).from_pretrained(tmp_path, dtype=torch.float32)
    assert peak(model)["model"]["peak_memory"]["value"] == 4
    assert [load.folder for load in loads] == [str(tmp_path)]

    def refused(load: Load) -> Memory:
        raise CheckpointError("it was killed")

    monkeypatch.setattr("hf_shrink.evaluation.costs.measure_memory", refused)
    assert peak(model)["skipped"] == {"peak_memory": "it was killed"}


def test_memory_is_not_that_of_the_model_it_was_made_from(tmp_path, loads):
    tiny_llama(num_hidden_layers=2).save_pretrained(tmp_path / "dense")
    model = type(tiny_llama()).from_pretrained(tmp_path / "dense", dtype=torch.float32)
    shrink(model, PACKED, progress=False)
    assert "save it" in peak(model)["skipped"]["peak_memory"] and not loads
    model.save_pretrained(tmp_path / "small")
    assert peak(type(model).from_pretrained(tmp_path / "small"))["model"]["peak_memory"]["value"] == 4
    assert [load.folder for load in loads] == [str(tmp_path / "small")]


def test_a_run_counts_the_memory_of_what_it_wrote(tmp_path, loads, monkeypatch):
    kinds = []

    def looked_at(load: Load) -> Memory:
        kinds.append("quantization_config" in (Path(load.folder) / "config.json").read_text())
        return Memory(1, 2, 3, 4)

    monkeypatch.setattr("hf_shrink.evaluation.costs.measure_memory", looked_at)
    monkeypatch.setattr(checkpointing, "write_report", lambda *given, **named: None)
    monkeypatch.setattr(measuring, "compare_decode_speed", lambda *given, **named: None)
    tiny_llama(num_hidden_layers=2).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    asked = {"metrics": ["peak_memory"], "samples": 2, "length": 16}
    report = shrink_checkpoint(tmp_path / "dense", tmp_path / "small", {**PACKED, "evaluation": asked}, progress=False)
    assert kinds == [True, False]  # the compressed model, the dense one
    assert report.evaluation["compressed"]["peak_memory"]["value"] == 4


def test_they_come_only_when_asked_for():
    rows = [{"question": "what", "choices": ["sand", "rocks"], "answer": 0}] * 2
    result = evaluate_model(tiny_llama(num_hidden_layers=2), rows, tokenizer=tiny_tokenizer())
    assert not {*COSTS, "attribution_fidelity"} & {*result["model"], *result["skipped"]}
