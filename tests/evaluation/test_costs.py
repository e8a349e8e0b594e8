"""Seconds, bytes and memory as metrics."""

from __future__ import annotations

import pytest
import torch
from perturbing import perturbed, windows
from tiny import tiny_llama, tiny_tokenizer

from hf_shrink.evaluation import evaluate_model, unique_bytes
from hf_shrink.evaluation.machine import can_measure_memory
from hf_shrink.evaluation.memory import Load
from hf_shrink.speed_report import Memory

COSTS = ("latency", "weight_bytes", "peak_memory")


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


@pytest.mark.skipif(not can_measure_memory(), reason="only Linux counts memory so")
def test_memory_is_counted_in_a_process_of_its_own(tmp_path, monkeypatch):
    loads: list[Load] = []

    def counted(load: Load) -> Memory:
        loads.append(load)
        return Memory(1, 2, 3, 4)

    monkeypatch.setattr("hf_shrink.evaluation.costs.measure_memory", counted)
    tiny_llama(num_hidden_layers=2).save_pretrained(tmp_path)
    model = type(tiny_llama()).from_pretrained(tmp_path, dtype=torch.float32)
    result = evaluate_model(model, [{"input_ids": windows(1, 8)}], metrics=COSTS)
    assert [load.folder for load in loads] == [str(tmp_path)]
    assert result["model"]["peak_memory"]["value"] == 4


def test_they_come_only_when_asked_for():
    rows = [{"question": "what", "choices": ["sand", "rocks"], "answer": 0}] * 2
    result = evaluate_model(tiny_llama(num_hidden_layers=2), rows, tokenizer=tiny_tokenizer())
    assert not {*COSTS, "attribution_fidelity"} & {*result["model"], *result["skipped"]}
