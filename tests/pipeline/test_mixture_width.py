"""Heads and channels of mixtures, pruned by recipe: scored expert by expert, refitted, quantized, saved, resumed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.saved import Saved, logits_of, run_stock
from conformance.cases import tokens
from conformance.cases_mixtures import MIXTURES, MORE, data
from elsewhere import DEVICE, pretending
from stock import Stock
from tiny import QUICK_GPTQ
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_shrink import make_plan, shrink
from hf_shrink.architectures import bind
from hf_shrink.architectures.experts import expert_mlps
from hf_shrink.calibration.walk import StackWalk
from hf_shrink.errors import RecipeError
from hf_shrink.ops.removal import removal_curve
from hf_shrink.plan import Plan
from hf_shrink.runtime.experts import separate_experts

EXPERTS = {"prune": {"what": "experts", "method": "reap", "experts": 2}}
GPTQ = {"quantize": {**QUICK_GPTQ, "scheme": "W8A16", "group_size": 8}}
BUILDS = {**MIXTURES, **MORE}


def width(method: str = "obs", **more: Any) -> dict[str, Any]:
    return {"prune": {"what": "width", "method": method, "ratio": 0.15, **more}}


ROWS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "mixtral": ("mixtral", [width()]),
    "between dense blocks": ("qwen3_moe", [width(units="mlp")]),
    "beside a shared expert": ("qwen2_moe", [width("wanda"), GPTQ]),
    "in few bits": ("olmoe", [width(), GPTQ]),
    "after experts": ("mixtral", [EXPERTS, width(), GPTQ]),
}


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def sparse(model: PreTrainedModel) -> list[Any]:
    return [block for block in bind(model).blocks if block.experts is not None]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, stock_process: Stock) -> dict[str, tuple[Any, Saved]]:
    root = tmp_path_factory.mktemp("mixture-width")
    models, saved = {}, {}
    for row, (family, steps) in ROWS.items():
        models[row] = shrink(BUILDS[family](), {"steps": steps}, calibration=data(), progress=False)
        folder = root / row.replace(" ", "_")
        models[row].save_pretrained(folder)
        saved[row] = Saved(folder, type(models[row]).__name__, logits_of(models[row]), ())
    found = run_stock(saved, stock_process)
    return {row: (models[row], found[row]) for row in ROWS}


@pytest.mark.parametrize("row", ROWS)
def test_stock_loads_what_is_left(row: str, outcomes: dict[str, tuple[Any, Saved]]) -> None:
    model, saved = outcomes[row]
    report = model.shrink_report
    assert report.portable and report.not_portable_because == [] and saved.stock_error is None
    assert (saved.stock_logits - saved.logits).abs().max() < 1e-4 * saved.logits.abs().max()
    before = bind(BUILDS[ROWS[row][0]]()).blocks[0].experts.channels
    assert {block.experts.channels < before for block in sparse(model)} == {True}


@pytest.mark.parametrize("name", ["glm4_moe", "mixtral"])
def test_blocks_of_different_sizes_load_with_us_alone(name: str, tmp_path: Path, stock_process: Stock) -> None:
    recipe = {"portable": False, "steps": [width(units="mlp")]}
    for steps in ([], [GPTQ]):
        recipe["steps"] = [width(units="mlp"), *steps]
        model: Any = shrink(BUILDS[name](), recipe, calibration=data(), progress=False)
        assert not model.shrink_report.portable and model.config.hf_shrink["experts"]
        folder = tmp_path / f"{len(steps)}"
        model.save_pretrained(folder)
        ids = tokens(3, 14)
        loaded = type(model).from_pretrained(folder).eval()
        assert torch.equal(logits(loaded, ids), logits(model, ids))
        loaded.save_pretrained(folder / "again")
        again = type(model).from_pretrained(folder / "again").eval()
        assert torch.equal(logits(again, ids), logits(model, ids))
        row = Saved(folder, type(model).__name__, logits_of(model), ())
        assert run_stock({"row": row}, stock_process)["row"].stock_logits is None


@pytest.mark.parametrize(("units", "ratio"), [("attention", 0.125), ("mlp", 0.25), ("all", 0.25)])
def test_a_ratio_counts_against_what_the_experts_that_stay_leave(units: str, ratio: float) -> None:
    counts = []
    for steps in ([EXPERTS], [EXPERTS, width("magnitude", units=units, ratio=ratio, refit=False)]):
        model: Any = shrink(MIXTURES["mixtral"](), {"steps": steps}, calibration=data(2), progress=False)
        counts.append(sum(block.parameters for block in bind(model).blocks))
    assert not [note for note in model.shrink_report.notes if "asked to remove" in note and "units" in note]
    assert 1 - counts[1] / counts[0] == pytest.approx(ratio, abs=0.01)


def test_each_expert_keeps_what_the_surgeon_keeps_of_it() -> None:
    """Against the definition: every expert's own curve, on the tokens that come to it; as many channels from each."""
    model = MIXTURES["mixtral"]()
    steps = [width(units="mlp", refit=False, exchanges=0)]
    plan = make_plan(copy.deepcopy(model), {"steps": steps}, calibration=data(), progress=False)
    separate_experts(model)
    stack = bind(model).stack("decoder")
    walk = StackWalk(model, [block.module for block in stack.blocks], data(), fast=True)
    counts = set()
    for block in stack.blocks:
        kept = plan.stacks["decoder"].blocks[block.index].expert_channels
        assert kept is not None
        counts |= {len(own) for own in kept}
        mlps = expert_mlps(block.experts)
        downs = {mlp.slot("down").path: mlp.modules[mlp.slot("down").path] for mlp in mlps}
        found = walk.statistics(downs, 4.0, passing=True)
        for own, (path, module) in zip(kept, downs.items(), strict=True):
            curve = removal_curve(module.weight.detach(), found[path].mean, 0.01)
            assert sorted(curve.order[len(curve.order) - len(own) :].tolist()) == list(own)
    assert len(counts) == 1 and len({*map(tuple, kept)}) == 4  # experts differ


def test_a_refit_takes_most_of_the_error_away() -> None:
    """Of channels that others can stand in for: halves of two copies, each of which the other can replace."""
    dense = MIXTURES["mixtral"]()
    with torch.no_grad():
        for layer in dense.model.layers:
            experts, half = layer.mlp.experts, layer.mlp.experts.down_proj.shape[-1] // 2
            for start in (0, 2 * half):
                experts.gate_up_proj[:, start + half : start + 2 * half] = experts.gate_up_proj[:, start : start + half]
    ids, whole = tokens(4, 20, seed=99), None
    errors = []
    for refit in (False, True):
        step = {"prune": {**width(units="mlp")["prune"], "ratio": 0.4, "refit": refit}}
        model: Any = shrink(copy.deepcopy(dense), {"steps": [step]}, calibration=data(), progress=False)
        whole = logits(dense, ids)
        errors.append(float((logits(model, ids) - whole).norm() / whole.norm()))
    assert errors[0] > 0.1 and errors[1] < 0.1 * errors[0]


def test_an_expert_without_tokens_is_judged_by_its_weights() -> None:
    model = MIXTURES["mixtral"]()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[3] = 0
            layer.mlp.gate.weight[:3] = layer.mlp.gate.weight[:3].abs() * 5  # one of these is always above 0
    few = [{"input_ids": batch["input_ids"][:2, :6]} for batch in data(2)]
    done: Any = shrink(model, {"steps": [width(units="mlp")]}, calibration=few, progress=False)
    assert torch.isfinite(logits(done, tokens(3, 14))).all()
    assert done.shrink_report.parameters_after < done.shrink_report.parameters_before


def test_gradients_score_heads_and_leave_experts() -> None:
    step = {"prune": {**width("taylor")["prune"], "ratio": 0.05}}
    model: Any = shrink(MIXTURES["mixtral"](), {"steps": [step]}, calibration=data(), progress=False)
    assert any("decoder experts keep all of their channels" in note for note in model.shrink_report.notes)
    assert model.config.num_attention_heads < 6 and model.config.intermediate_size == 80
    with pytest.raises(RecipeError, match=r"taylor cannot score the channels of experts.*use obs or wanda"):
        make_plan(MIXTURES["mixtral"](), {"steps": [width("taylor", units="mlp")]}, calibration=data(), progress=False)


def test_a_plan_does_it_again(tmp_path: Path) -> None:
    recipe = {"steps": [EXPERTS, width(), GPTQ]}
    plan = make_plan(MIXTURES["mixtral"](), recipe, calibration=data(), progress=False)
    assert "channels of each expert" in plan.summary()
    plan.to_json(tmp_path / "plan.json")
    read = Plan.from_json(tmp_path / "plan.json")
    assert read == plan
    first: Any = shrink(MIXTURES["mixtral"](), recipe, calibration=data(), progress=False)
    again: Any = shrink(MIXTURES["mixtral"](), read, calibration=data(), progress=False)
    for (name, one), (other_name, other) in zip(first.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other_name and torch.equal(one, other), name


def test_what_the_config_cannot_say_is_said() -> None:
    """Shared experts of GLM-4 take their width from the key that the experts have theirs from."""
    step = {"prune": {**width()["prune"], "ratio": 0.05}}
    model: Any = shrink(MORE["glm4_moe"](), {"steps": [step]}, calibration=data(), progress=False)
    report = model.shrink_report
    assert report.portable and any("experts keeps all of its units: no config key" in note for note in report.notes)
    assert model.config.moe_intermediate_size == 24 and model.config.num_attention_heads < 6


@pytest.mark.slow
def test_it_stays_on_the_device() -> None:
    recipe = {"steps": [EXPERTS, width(), GPTQ]}
    ids = tokens(3, 14)
    expected: Any = shrink(MIXTURES["mixtral"](), recipe, calibration=data(), progress=False)
    with pretending() as device:
        model: Any = shrink(MIXTURES["mixtral"]().to(device), recipe, calibration=data(), progress=False)
        found = logits(model, ids.to(device)).cpu()
    assert all(tensor.device == DEVICE for tensor in (*model.parameters(), *model.buffers()))
    torch.testing.assert_close(found.as_subclass(Tensor), logits(expected, ids), rtol=1e-3, atol=1e-3)
