"""Budgets from recipe to model, and sweeps over them, on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.cases_encoders import CASES as ENCODERS
from tiny import VOCABULARY, tiny_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTNeoConfig, GPTNeoForCausalLM

from hf_shrink import make_plan, shrink, shrink_checkpoint
from hf_shrink.errors import ArchitectureError, RecipeError
from hf_shrink.evaluation.size import stored_bytes
from hf_shrink.front import Front
from hf_shrink.pipeline.searching import Searching
from hf_shrink.pipeline.sweep import make_front
from hf_shrink.plan import Plan, Scheme
from hf_shrink.progress import quiet
from hf_shrink.recipe import Recipe
from hf_shrink.search.latency import LatencyTable
from hf_shrink.search.limits import Limits
from hf_shrink.search.solve import Programme

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
    monkeypatch.setattr("hf_shrink.search.fingerprint.measure", never)
    model = tiny_llama()
    with pytest.raises(RecipeError, match=r"the least that this search reaches is .* of the dense model's .*lm_head"):
        make_plan(model, {"portable": False, **recipe({"bytes": "2%"})}, calibration=data(), progress=False)
    with pytest.raises(RecipeError, match=r"portable: false \(--set portable=false\), so that embeddings"):
        make_plan(model, recipe({"bytes": "10%"}), calibration=data(), progress=False)
    with pytest.raises(ArchitectureError, match="only transformers models take a budget"):
        make_plan(nn.Linear(4, 4), recipe({"bytes": "50%"}), calibration=data(), progress=False)


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("measured")


def test_a_budget_that_the_dense_model_keeps_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_shrink.search.fingerprint.measure", never)
    asked = recipe({"bytes": "100%"}, generations=0)
    with pytest.raises(RecipeError, match=r"keeps the budget .* as it is"):
        make_plan(tiny_llama(), asked, calibration=data(), progress=False)
    with pytest.raises(RecipeError, match=r"keeps the budget .* as it is"):
        make_plan(tiny_llama(), {**asked, "dtype": "float32"}, calibration=data(), progress=False)
    with pytest.raises(RecipeError, match=r"keeps the budget .* as it is"):
        make_front(tiny_llama(), asked, ["30%", "100%"], calibration=data(), progress=False)


def test_a_budget_that_a_cast_keeps_needs_nothing_else(
    dense_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_shrink.search.fingerprint.measure", never)
    asked = {"dtype": "bfloat16", **recipe({"bytes": "60%"}, effort="best")}
    model = shrink(tiny_llama(), asked, calibration=data(), progress=False)
    model.save_pretrained(tmp_path)
    plan = model.shrink_record.plan
    assert plan.dtype == "bfloat16" and not plan.schemes and not plan.prunes and not plan.tune
    assert 0.49 * dense_bytes < stored_bytes(tmp_path) < 0.6 * dense_bytes
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_shares_are_of_the_files_of_the_model_as_it_was_given(tmp_path: Path) -> None:
    """Of GPT-Neo's, whose masks are in memory and not in its files."""
    sizes = {"vocab_size": 300, "hidden_size": 48, "num_layers": 2, "num_heads": 6, "max_position_embeddings": 256}
    config = GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 1]], bos_token_id=1, eos_token_id=2)
    model = GPTNeoForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "dense")
    ids = [{"input_ids": batch["input_ids"] % 300} for batch in data(1)]
    asked = {"dtype": "bfloat16", "portable": False, **recipe({"bytes": "30%"}, generations=0, bits=[2, 4])}
    shrink(model, asked, calibration=ids, progress=False)
    model.save_pretrained(tmp_path / "small")
    assert stored_bytes(tmp_path / "small") <= 0.3 * stored_bytes(tmp_path / "dense")


def counted(table: LatencyTable, rows: int, columns: int, scheme: Scheme | None) -> dict[str, float]:
    """In place of measuring."""
    bits = 8 * table.dtype.itemsize if scheme is None else scheme.bits
    return dict.fromkeys(("decode", "prefill"), rows * columns * bits * 1e-9)


def test_all_shares_are_of_the_dtype_that_was_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_SHRINK_CACHE", str(tmp_path))
    monkeypatch.setattr(LatencyTable, "_measure", counted)
    model, dense = tiny_llama(num_hidden_layers=2), list[Any]()
    for dtype in ("keep", "bfloat16"):
        budget = {"bytes": "60%", "memory": "60%", "latency": {"decode": "100%", "prefill": "100%"}, "context": 512}
        asked = Recipe.from_dict({"dtype": dtype, **recipe(budget, bits=[4], width=False)})
        assert asked.budget is not None
        with Searching.on(model, asked, (), 0, quiet) as search:
            problem = search.sizes(timed=True)
            dense.append(search.limits(asked.budget, problem).dense)
    assert dense[0] == dense[1]
    assert problem.dense.seconds["decode"] < dense[0]["decode"]
    assert problem.dense.memory(512) == pytest.approx(dense[0]["memory"] / 2, rel=0.02)


@pytest.mark.parametrize("generations", [0, 1])
def test_a_latency_next_to_the_least_is_met_though_the_machine_gets_slower(
    generations: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_SHRINK_CACHE", str(tmp_path))
    monkeypatch.setattr(LatencyTable, "_measure", counted)
    looks: list[float] = []

    def slower(_: nn.Module) -> dict[str, float]:
        looks.append(1.05 ** len(looks))
        return {"decode": 0.1 * looks[-1], "prefill": 0.01 * looks[-1]}

    monkeypatch.setattr("hf_shrink.search.latency.model_seconds", slower)
    model = tiny_llama(num_hidden_layers=2)
    with Searching.on(model, Recipe.from_dict(recipe({"latency": "99%"}, bits=[4])), (), 0, quiet) as search:
        problem = search.sizes(timed=True)
        least = Programme(problem, Limits({}, {})).least("decode")
    budget = f"{1010 * problem.cost(least).seconds['decode']:.6f}ms"
    asked = recipe({"latency": budget}, bits=[4], generations=generations)
    plan = make_plan(model, asked, calibration=data(1), progress=False)
    assert plan.search["takes"]["decode"] <= plan.search["limits"]["decode"]


def test_a_model_that_writes_nothing_has_no_time_of_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_shrink.search.latency.model_seconds", never)
    with pytest.raises(ArchitectureError, match="writes no tokens"):
        make_plan(ENCODERS["bert_masked_lm"].build(), recipe({"latency": "60%"}), progress=False)


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


def test_a_sweep_leaves_no_budget_out() -> None:
    both = recipe({"bytes": "30%", "latency": "60%"})
    with pytest.raises(RecipeError, match=r"nothing would limit decode; leave that out"):
        make_front(tiny_llama(), both, ["30%", "60%"], calibration=data(), progress=False)


def test_a_sweep_is_at_one_context(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe({"memory": "50%", "context": 4000})
    for budgets in (["memory:40%@10", "memory:60%@4000"], ["memory:40%@10", "memory:60%"]):
        with pytest.raises(RecipeError, match="one number of tokens"):
            make_front(tiny_llama(), asked, budgets, calibration=data(), progress=False)
    seen = []
    monkeypatch.setattr(Searching, "check", lambda _, budget: seen.append(budget.context))
    monkeypatch.setattr("hf_shrink.pipeline.sweep.calibration_batches", never)
    with pytest.raises(AssertionError, match="measured"):
        make_front(tiny_llama(), asked, ["memory:40%", "memory:60%@4000"], calibration=data(), progress=False)
    assert set(seen) == {4000}


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
