"""What a run is said to take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conformance.cases_mixtures import mixtral
from tiny import tiny_llama
from transformers import PreTrainedModel

from hf_shrink import make_plan, shrink_checkpoint
from hf_shrink.errors import CheckpointError
from hf_shrink.evaluation.size import stored_bytes, unique_bytes
from hf_shrink.pipeline import estimating
from hf_shrink.pipeline.estimating import estimate
from hf_shrink.pipeline.foreseen import foreseen
from hf_shrink.pipeline.recipes import load_recipe
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


W4 = {"scheme": "W4A16", "method": "rtn", "group_size": 16}
DEPTH = {"what": "depth", "method": "block_influence", "blocks": 1}
WIDTH = {"what": "width", "method": "magnitude", "ratio": 0.3, "refit": False}
EVERYTHING = {
    **W4,
    "targets": ["Linear", "Embedding"],
    "ignore": [],
    "overrides": {"re:.*up_proj": {"scheme": "W8A16"}},
}
FOREKNOWN: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any], bool]] = {
    "quantized": (tiny_llama, {"steps": [{"quantize": {**W4, "head": "W8A16"}}]}, True),
    "all of it": (lambda: tiny_llama(tie_word_embeddings=True), {"steps": [{"quantize": EVERYTHING}]}, True),
    "experts": (lambda: mixtral(num_hidden_layers=2), {"steps": [{"quantize": W4}]}, True),
    "another format": (
        lambda: tiny_llama(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2),
        {"steps": [{"quantize": {"method": "bitsandbytes", "scheme": "NF4"}}]},
        True,
    ),
    "cast and pruned": (tiny_llama, {"dtype": "bfloat16", "steps": [{"prune": WIDTH}]}, True),
    "pruned and quantized": (tiny_llama, {"steps": [{"prune": DEPTH}, {"quantize": W4}]}, False),
}


@pytest.mark.parametrize("name", FOREKNOWN)
def test_what_is_known_of_a_plan_before_it_is_made_takes_no_more_than_it(name: str) -> None:
    build, recipe, exactly = FOREKNOWN[name]
    model, read = build(), load_recipe({"portable": False, **recipe})
    data = [{"input_ids": torch.arange(5, 29)[None]}]
    early = foreseen(model, read)
    assert early is not None
    plan = make_plan(model, read, calibration=data, progress=False)
    before, after = (estimate(model, found, 0, 0) for found in (early, plan))
    assert before.disk == after.disk if exactly else 0.4 * after.disk < before.disk < after.disk
    assert foreseen(model, plan) is plan


def test_a_disk_that_is_too_small_for_any_plan_is_refused_before_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    tiny_llama().save_pretrained(source)
    monkeypatch.setattr(estimating, "shutil", SimpleNamespace(disk_usage=lambda folder: SimpleNamespace(free=100_000)))
    recipe = {"steps": [{"quantize": W4}], "evaluation": {"metrics": []}}
    with pytest.raises(CheckpointError, match="the run needs up to 0 MB of disk"):
        shrink_checkpoint(source, tmp_path / "out", recipe, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
