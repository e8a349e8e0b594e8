"""Budgets over mixtures of experts: bits for experts beside everything else, within what stock can load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.saved import Saved, logits_of, run_stock
from conformance.cases import tokens
from conformance.cases_mixtures import MIXTURES, MORE, data
from stock import Stock
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_shrink import make_plan, shrink
from hf_shrink.architectures import bind
from hf_shrink.errors import ArchitectureError, CalibrationError, RecipeError
from hf_shrink.evaluation.size import stored_bytes
from hf_shrink.pipeline.searching import Searching
from hf_shrink.progress import quiet
from hf_shrink.recipe import Recipe
from hf_shrink.runtime.experts import SeparateExperts
from hf_shrink.search.levers import levers_of
from hf_shrink.search.pieces import EXPERTS

BUILDS = {**MIXTURES, **MORE}
SEARCH = {"bits": [2, 4, 8], "group_size": 8, "effort": "balanced", "generations": 1}


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_SHRINK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def recipe(share: str, portable: bool, **search: Any) -> dict[str, Any]:
    return {"portable": portable, "budget": {"bytes": share}, "search": {**SEARCH, **search}}


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def expert_schemes(model: PreTrainedModel, schemes: dict[str, Any]) -> set[Any]:
    paths = [path for block in bind(model).blocks if block.experts is not None for path in block.experts.matrices]
    return {schemes.get(path) for path in paths}


CASES = [(name, *rest) for name in ("mixtral", "qwen2_moe", "glm4_moe") for rest in ((True, 0.55), (False, 0.35))]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "portable", "share"), CASES)
def test_the_result_keeps_the_budget(
    name: str, portable: bool, share: float, tmp_path: Path, stock_process: Stock
) -> None:
    dense: Any = BUILDS[name]()
    dense.save_pretrained(tmp_path / "dense")
    state = {key: value.clone() for key, value in dense.state_dict().items()}
    make_plan(dense, recipe(f"{100 * share}%", portable), calibration=data(), progress=False)
    assert all(torch.equal(value, state[key]) for key, value in dense.state_dict().items())  # as it was, not apart

    model: Any = shrink(dense, recipe(f"{100 * share}%", portable), calibration=data(), progress=False)
    model.save_pretrained(tmp_path / "small")
    plan, whole = model.shrink_record.plan, stored_bytes(tmp_path / "dense")
    assert stored_bytes(tmp_path / "small") <= share * whole
    assert stored_bytes(tmp_path / "small") == pytest.approx(plan.search["bytes"], rel=0.01)
    assert plan.search["measured_kl"] > 0 and model.shrink_report.portable is portable
    found = expert_schemes(BUILDS[name](), dict(plan.schemes))
    assert found != {None}
    loaded = type(model).from_pretrained(tmp_path / "small").eval()
    assert torch.equal(logits(loaded, tokens(2, 9)), logits(model, tokens(2, 9)))
    if portable:
        assert len(found) == 1
        saved = Saved(tmp_path / "small", type(model).__name__, logits_of(model), ())
        row = run_stock({"row": saved}, stock_process)["row"]
        assert row.stock_error is None
        assert (row.stock_logits - row.logits).abs().max() < 1e-4 * row.logits.abs().max()


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("portable", [True, False])
def test_experts_lose_channels(portable: bool, tmp_path: Path, stock_process: Stock) -> None:
    dense: Any = MIXTURES["qwen3_moe"](num_hidden_layers=3, mlp_only_layers=[], moe_intermediate_size=64)
    dense.save_pretrained(tmp_path / "dense")
    asked = recipe("70%", portable, bits=[], depth=False, embeddings=False, generations=0)
    model: Any = shrink(dense, asked, calibration=data(), progress=False)
    model.save_pretrained(tmp_path / "small")
    record = model.shrink_record
    assert stored_bytes(tmp_path / "small") <= 0.7 * stored_bytes(tmp_path / "dense")
    assert stored_bytes(tmp_path / "small") == pytest.approx(record.plan.search["bytes"], rel=0.01)
    blocks = record.plan.stacks["decoder"].blocks
    counts = [block.experts.channels for block in bind(model).blocks]
    assert min(counts) < 64 and all(count % 8 == 0 for count in counts)
    for index, count in enumerate(counts):
        kept = blocks[index].expert_channels if index in blocks else None
        assert count == (64 if kept is None else len(kept[0]))
        assert kept is None or len(set(kept)) > 1  # each its own
    loaded = type(model).from_pretrained(tmp_path / "small").eval()
    assert torch.equal(logits(loaded, tokens(2, 9)), logits(model, tokens(2, 9)))
    if portable:
        assert model.shrink_report.portable
        assert model.config.moe_intermediate_size == counts[0] and len(set(counts)) == 1
        saved = Saved(tmp_path / "small", type(model).__name__, logits_of(model), ())
        row = run_stock({"row": saved}, stock_process)["row"]
        assert row.stock_error is None
        assert (row.stock_logits - row.logits).abs().max() < 1e-4 * row.logits.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("bits", [[2, 3, 4], []])
def test_what_experts_lose_is_predicted(bits: list[int]) -> None:
    """Against true trials of whole pieces, rounded or cut, also of experts that few tokens come to."""
    model = MIXTURES["qwen3_moe"](num_hidden_layers=3, mlp_only_layers=[], num_experts=12, moe_intermediate_size=48)
    asked = Recipe.from_dict(recipe("50%", False, bits=bits))
    with torch.no_grad(), Searching.on(model, asked, data(8), 0, quiet) as search:
        assert isinstance(model.model.layers[0].mlp.experts, SeparateExperts)
        found = search.sensitivity
        problem = search.problem(found, timed=False)
        measured = search.measured(problem)
        dense = (0,) * len(problem.groups)
        ratios = []
        for number, group in enumerate(problem.groups):
            if not group.name.endswith(" experts"):
                continue
            for place, option in enumerate(group.options):
                one_lever = len(levers_of(option)) == 1 and not option.change.dropped
                if one_lever and option.damage > 1e-6:
                    trial = (*dense[:number], place, *dense[number + 1 :])
                    (true,) = measured.divergences(dense, [trial], None)
                    ratios.append(option.damage / true)
    assert not isinstance(model.model.layers[0].mlp.experts, SeparateExperts)
    assert len(ratios) >= 6
    assert all(1 / 3 < ratio < 3 for ratio in ratios), ratios
    if bits:
        kinds = {name.split(" ", 1)[1] for name in found.rounding}
        assert {*EXPERTS, "attention in", "attention out"} <= kinds
        factors = [factor for name, factor in found.factors.items() if "experts" in name]
        assert factors and all(0.1 < factor < 10 for factor in factors), found.factors


def test_experts_without_tokens_are_rounded_without_data() -> None:
    model = MIXTURES["mixtral"]()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[3] = 0
            layer.mlp.gate.weight[:3] = layer.mlp.gate.weight[:3].abs() * 5
    few = [{"input_ids": batch["input_ids"][:2, :6]} for batch in data(2)]
    asked = recipe("40%", False)
    plan = make_plan(model, asked, calibration=few, progress=False)
    assert any(".experts.3." in path for path in plan.schemes)
    hardly_any = [{"input_ids": data(1)[0]["input_ids"][:1, :6]}]  # no expert has statistics
    with torch.no_grad(), Searching.on(model, Recipe.from_dict(asked), hardly_any, 0, quiet) as search:
        rounding = search.sensitivity.rounding
    for name in ("model.layers.0 experts in", "model.layers.1 experts out"):
        costs = [rounding[name].damage[scheme] for scheme in sorted(rounding[name].damage, key=lambda s: s.bits)]
        assert costs[0] > costs[1] > costs[2] > 0


@pytest.mark.slow
def test_blocks_go_and_what_cannot_be_is_said() -> None:
    asked = recipe("30%", True, bits=[8], width=False)
    model: Any = shrink(MIXTURES["mixtral"](num_hidden_layers=5), asked, calibration=data(), progress=False)
    assert model.config.num_hidden_layers < 5 and model.shrink_report.portable
    with pytest.raises(RecipeError, match=r"least that this search reaches.*portable: false"):
        make_plan(MIXTURES["mixtral"](), recipe("5%", True), calibration=data(), progress=False)
    with pytest.raises(ArchitectureError, match=r"of a mixture's experts a token takes some; give a budget in bytes"):
        make_plan(MIXTURES["mixtral"](), {"budget": {"latency": "60%"}}, calibration=data(), progress=False)


def test_dense_experts_go_with_dense_weights_only() -> None:
    """Portable: of all assignments none packs anything beside dense experts, or experts by two schemes."""
    model = MIXTURES["mixtral"](num_hidden_layers=2)
    asked = Recipe.from_dict(recipe("90%", True, bits=[4, 8], depth=True))
    with torch.no_grad(), Searching.on(model, asked, data(), 0, quiet) as search:
        problem = search.problem(search.sensitivity, timed=False)
    draw = torch.Generator().manual_seed(0)
    seen = 0
    for _ in range(3000):
        assignment = tuple(int(torch.randint(len(g.options), (1,), generator=draw)) for g in problem.groups)
        if not problem.allowed(assignment):
            continue
        seen += 1
        plan = problem.plan(assignment)
        gone = {i for i in range(2) if "decoder" in plan.stacks and i not in plan.stacks["decoder"].kept}
        left = [path for block in bind(model).blocks if block.index not in gone for path in block.experts.matrices]
        schemes = {plan.schemes.get(path) for path in left}
        assert len(schemes) == 1
        assert not plan.schemes or schemes != {None}
    assert seen > 20


@pytest.mark.parametrize("starved", ["rtn", "error"])
def test_a_run_does_with_starved_experts_what_the_search_says(starved: str) -> None:
    """The search takes them to be rounded without data, so that is the default."""
    few = [{"input_ids": data(1)[0]["input_ids"][:1, :6]}]
    asked = recipe("40%", False, generations=0, width=False, depth=False)
    if starved == "error":
        asked["search"]["starved_experts"] = starved
        with pytest.raises(CalibrationError, match=r"budget --set search\.starved_experts=rtn"):
            shrink(MIXTURES["mixtral"](num_hidden_layers=2), asked, calibration=few, progress=False)
        return
    model = shrink(MIXTURES["mixtral"](num_hidden_layers=2), asked, calibration=few, progress=False)
    assert any("compressed without data" in note for note in model.shrink_report.notes)


def test_another_treatment_of_starved_experts_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"unknown search\.starved_experts 'rnt'.*'rtn'"):
        Recipe.from_dict(recipe("40%", False, starved_experts="rnt"))
