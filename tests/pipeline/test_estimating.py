"""What a run is said to take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conformance.cases_mixtures import mixtral
from tiny import tiny_llama

from hf_shrink import make_plan
from hf_shrink.evaluation.size import stored_bytes, unique_bytes
from hf_shrink.pipeline.estimating import estimate
from hf_shrink.pipeline.shrinking import shrink


@pytest.mark.parametrize("tied", [True, False])
def test_a_shared_table_is_counted_once(tied: bool, tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    step = {"scheme": "W8A16", "method": "rtn", "group_size": 32, "targets": ["Linear", "Embedding"], "ignore": []}
    recipe = {"portable": False, "steps": [{"quantize": step}]}
    needs = estimate(model, make_plan(model, recipe), 0, 0)
    shrink(model, recipe, progress=False)
    assert needs.output == pytest.approx(unique_bytes(model), rel=0.15)  # a tiny model has more of other things
    model.save_pretrained(tmp_path)
    assert needs.disk >= stored_bytes(tmp_path)


def test_tuning_is_not_in_the_time_and_it_says_so() -> None:
    model = tiny_llama()
    step = {"scheme": "W4A16", "method": "rtn", "group_size": 16}
    plans = [make_plan(model, {"steps": [{"quantize": {**step, **more}}]}) for more in ({}, {"tune": {"steps": 2}})]
    assert ["tuning besides" in estimate(model, plan, 0, 0).summary() for plan in plans] == [False, True]


def test_weights_count_in_the_dtype_that_they_will_have(tmp_path: Path) -> None:
    model = tiny_llama().bfloat16()
    step = {"what": "depth", "method": "block_influence", "blocks": 1}
    data = [{"input_ids": torch.arange(5, 29)[None]}]
    plan = make_plan(model, {"dtype": "float32", "steps": [{"prune": step}]}, calibration=data, progress=False)
    needs = estimate(model, plan, 0, 0)
    shrink(model, plan, calibration=data, progress=False).save_pretrained(tmp_path)
    assert stored_bytes(tmp_path) <= needs.output


def test_experts_count_in_their_bits_and_a_budget_counts_as_it_is(tmp_path: Path) -> None:
    model = mixtral(num_hidden_layers=2)
    step = {"scheme": "W4A16", "method": "rtn", "group_size": 16}
    needs = estimate(model, make_plan(model, {"steps": [{"quantize": step}]}, progress=False), 0, 0)
    searched = replace(make_plan(model, {"steps": [{"quantize": step}]}), search={"bytes": 12_345})
    assert estimate(model, searched, 0, 0).output == 12_345
    shrink(model, {"steps": [{"quantize": step}]}, progress=False)
    assert needs.output == pytest.approx(unique_bytes(model), rel=0.15)
