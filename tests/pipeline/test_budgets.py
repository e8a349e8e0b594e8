"""Budgets from recipe to model, and sweeps over them, on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, tiny_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_shrink import make_plan, shrink, shrink_checkpoint
from hf_shrink.errors import ArchitectureError, RecipeError
from hf_shrink.evaluation.size import stored_bytes
from hf_shrink.front import Front
from hf_shrink.pipeline.sweep import make_front
from hf_shrink.plan import Plan

SEARCH = {"group_size": 16, "effort": "fast", "generations": 1}


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_SHRINK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def data(batches: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, VOCABULARY, (4, 24), generator=generator)} for _ in range(batches)]


def recipe(budget: dict[str, Any], **search: Any) -> dict[str, Any]:
    return {"budget": budget, "search": {**SEARCH, **search}}


@pytest.fixture(scope="module")
def dense_bytes(tmp_path_factory: pytest.TempPathFactory) -> int:
    folder = tmp_path_factory.mktemp("dense")
    tiny_llama().save_pretrained(folder)
    return stored_bytes(folder)


@pytest.mark.parametrize(("portable", "share"), [(True, 0.4), (False, 0.25)])
def test_the_result_keeps_the_budget_and_is_what_the_plan_said(
    portable: bool, share: float, dense_bytes: int, tmp_path: Path
) -> None:
    model = tiny_llama()
    asked = {"portable": portable, **recipe({"bytes": f"{100 * share:g}%"})}
    shrink(model, asked, calibration=data(), progress=False)
    model.save_pretrained(tmp_path)
    plan = model.shrink_record.plan
    assert stored_bytes(tmp_path) <= share * dense_bytes
    assert stored_bytes(tmp_path) == pytest.approx(plan.search["bytes"], rel=0.005)
    assert plan.search["measured_kl"] > 0
    assert plan.effort == "fast"
    assert Plan.from_json(plan.to_json()) == plan
    assert model.shrink_report.portable == portable
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    x = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.allclose(again(x).logits, model(x).logits, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_searched_as_they_are_stored(dtype: torch.dtype) -> None:
    model = tiny_llama().to(dtype)
    shrink(model, recipe({"bytes": 160_000}, generations=0, bits=[4, 8]), calibration=data(1), progress=False)
    assert model.shrink_record.plan.search["bytes"] <= 160_000
    with torch.no_grad():
        logits = model(**data(1)[0]).logits
    assert logits.dtype == dtype and logits.isfinite().all()


def test_the_same_seed_gives_the_same_plan_and_a_second_budget_needs_no_second_measurement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = make_plan(tiny_llama(), recipe({"bytes": "40%"}), calibration=data(), progress=False)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("hf_shrink.search.fingerprint.measure", never)
    assert make_plan(tiny_llama(), recipe({"bytes": "40%"}), calibration=data(), progress=False) == first
    second = make_plan(tiny_llama(), recipe({"bytes": "60%"}, generations=0), calibration=data(), progress=False)
    assert second.search["predicted_kl"] < first.search["predicted_kl"]
    assert "measured_kl" not in second.search


def test_memory_and_latency_can_be_limited_together() -> None:
    asked = recipe({"memory": "60%", "context": 512, "latency": "100%"}, bits=[4, 8], generations=0)
    plan = make_plan(tiny_llama(), asked, calibration=data(), progress=False)
    takes, limits = plan.search["takes"], plan.search["limits"]
    assert takes.keys() == limits.keys() == {"memory", "decode"}
    assert all(takes[name] <= limits[name] for name in limits)


def test_what_cannot_be_met_fails_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr("hf_shrink.search.fingerprint.measure", never)
    model = tiny_llama()
    with pytest.raises(RecipeError, match=r"the least that this search reaches is .* of the dense model's .*lm_head"):
        make_plan(model, {"portable": False, **recipe({"bytes": "2%"})}, calibration=data(), progress=False)
    with pytest.raises(RecipeError, match=r"portable: false \(--set portable=false\), so that embeddings"):
        make_plan(model, recipe({"bytes": "10%"}), calibration=data(), progress=False)
    with pytest.raises(ArchitectureError, match="only transformers models take a budget"):
        make_plan(nn.Linear(4, 4), recipe({"bytes": "50%"}), calibration=data(), progress=False)


def test_a_budget_that_the_dense_model_keeps_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"keeps the budget .* as it is"):
        make_plan(tiny_llama(), recipe({"bytes": "100%"}, generations=0), calibration=data(), progress=False)


@pytest.fixture(scope="module")
def front() -> Front:
    asked = {**recipe({"bytes": "30%"}), "portable": False, "evaluation": {"data": "self", "samples": 4, "length": 24}}
    return make_front(tiny_llama(), asked, ["30%", "60%"], tokenizer=None, calibration=data(), progress=False)


def test_a_sweep_measures_once_and_gives_a_plan_for_every_budget(front: Front) -> None:
    kinds = [point.kind for point in front.points]
    assert kinds.count("dense") == 1
    assert kinds.count("plan") == 2
    assert "uniform" in kinds
    by_name = {point.name: point for point in front.points}
    dense, small, large = by_name["dense"], by_name["30%"], by_name["60%"]
    assert dense.kl == pytest.approx(0.0, abs=1e-6)
    assert small.bytes <= 0.3 * dense.bytes
    assert small.bytes < large.bytes < dense.bytes
    assert small.kl > large.kl > 0
    assert small.perplexity is not None
    assert sum(small.paid.values()) == pytest.approx(dense.bytes - small.bytes, rel=1e-9)
    model = tiny_llama()
    shrink(model, front.plan("30%"), calibration=data(), progress=False)
    assert model.shrink_report.bytes_after <= 0.3 * dense.bytes


def test_a_sweep_is_over_one_resource() -> None:
    for budgets in (["30%", "latency:60%"], []):
        with pytest.raises(RecipeError, match="over one resource"):
            make_front(tiny_llama(), recipe({"bytes": "30%"}), budgets, calibration=data(), progress=False)
    with pytest.raises(RecipeError, match="goes over budgets"):
        make_front(tiny_llama(), "w4a16", ["30%"], calibration=data(), progress=False)


@pytest.mark.slow
def test_a_rehearsed_search_takes_the_best_of_what_it_carried_out(dense_bytes: int) -> None:
    """On a copy: the model is the same before and after, and the budget holds."""
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    asked = {"portable": False, **recipe({"bytes": "14%"}, effort="balanced", rehearse=True)}
    plan = make_plan(model, asked, calibration=data(), progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert plan.search["bytes"] <= 0.14 * dense_bytes
    assert plan.search["rehearsed_others"]
    assert 0 < plan.search["rehearsed_kl"] <= min(plan.search["rehearsed_others"])


def test_what_is_not_in_memory_is_not_rehearsed(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "dense")
    asked = recipe({"bytes": "40%"}, rehearse=True)
    with pytest.raises(RecipeError, match="weights stay in files"):
        shrink_checkpoint(tmp_path / "dense", tmp_path / "out", asked, calibration=data(), progress=False)
    assert not (tmp_path / "out").exists()
