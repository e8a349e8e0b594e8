"""Experts pruned by recipe: with depth and quantization, saved, loaded by stock, and applied again from the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.saved import Saved, logits_of, run_stock
from conformance.cases import tokens
from conformance.cases_mixtures import MIXTURES, MORE, data
from stock import Stock
from tiny import QUICK_GPTQ
from torch import Tensor, nn

from hf_shrink import make_plan, shrink
from hf_shrink.architectures import bind
from hf_shrink.errors import RecipeError
from hf_shrink.plan import Plan
from hf_shrink.runtime import CompressedLinear

DEPTH = {"prune": {"what": "depth", "method": "block_influence", "blocks": 1}}
EXPERTS = {"prune": {"what": "experts", "method": "reap", "experts": 2}}
MERGED = {"prune": {"what": "experts", "method": "frequency", "experts": 2, "merge": True}}
GPTQ = {"quantize": {**QUICK_GPTQ, "scheme": "W8A16", "group_size": 16}}
ROWS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "experts": ("mixtral", [EXPERTS]),
    "merged": ("qwen3_moe", [MERGED]),
    "depth and experts": ("olmoe", [DEPTH, EXPERTS]),
    "experts in few bits": ("qwen2_moe", [EXPERTS, GPTQ]),
    "groups of experts in few bits": ("glm4_moe", [EXPERTS, GPTQ]),
    "depth and experts in few bits": ("mixtral", [DEPTH, EXPERTS, GPTQ]),
}


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, stock_process: Stock) -> dict[str, tuple[Any, Saved]]:
    root = tmp_path_factory.mktemp("experts")
    models, saved = {}, {}
    for row, (family, steps) in ROWS.items():
        models[row] = shrink({**MIXTURES, **MORE}[family](), {"steps": steps}, calibration=data(), progress=False)
        folder = root / row.replace(" ", "_")
        models[row].save_pretrained(folder)
        saved[row] = Saved(folder, type(models[row]).__name__, logits_of(models[row]), ())
    found = run_stock(saved, stock_process)
    return {row: (models[row], found[row]) for row in ROWS}


@pytest.mark.parametrize("row", ROWS)
def test_stock_loads_what_is_left(row: str, outcomes: dict[str, tuple[Any, Saved]]) -> None:
    model, saved = outcomes[row]
    report = model.shrink_report
    assert report.portable and report.not_portable_because == []
    assert saved.stock_error is None
    assert (saved.stock_logits - saved.logits).abs().max() < 1e-4 * saved.logits.abs().max()
    kept = {block.experts.count for block in bind(model).blocks if block.experts is not None}
    left = {"mixtral": 2, "olmoe": 3, "qwen2_moe": 3, "qwen3_moe": 3, "glm4_moe": 4}[ROWS[row][0]]
    assert kept == {left} and saved.config()["num_experts_per_tok"] == 2
    assert left in [saved.config().get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts")]
    assert report.parameters_after < 0.95 * report.parameters_before
    if GPTQ in ROWS[row][1]:
        experts = [m for path, m in model.named_modules() if ".experts." in path and path.count(".") == 6]
        assert experts and all(isinstance(matrix, CompressedLinear) for matrix in experts)


def test_calibrated_compression_follows_the_experts_that_are_left(outcomes: dict[str, tuple[Any, Saved]]) -> None:
    """8 bits cost little beside the same pruning without them: schemes went to the right experts."""
    quantized = outcomes["experts in few bits"][0]
    pruned: Any = shrink(MIXTURES["qwen2_moe"](), {"steps": [EXPERTS]}, calibration=data(), progress=False)
    ids = tokens(4, 20, seed=99)
    difference = (logits(quantized, ids) - logits(pruned, ids)).norm() / logits(pruned, ids).norm()
    assert 0 < difference < 0.3


def test_a_plan_does_it_again(tmp_path: Path) -> None:
    recipe = {"steps": [DEPTH, MERGED, {"quantize": {"method": "rtn", "scheme": "W8A16", "group_size": 16}}]}
    plan = make_plan(MIXTURES["mixtral"](), recipe, calibration=data(), progress=False)
    ((_, block),) = plan.stacks["decoder"].blocks.items()
    assert block.experts is not None and block.merges and "merged into them" in plan.summary()
    gone = set(range(4)) - set(block.experts)
    assert not [path for path in plan.schemes if ".experts." in path and int(path.split(".")[5]) in gone]
    plan.to_json(tmp_path / "plan.json")
    read = Plan.from_json(tmp_path / "plan.json")
    assert read == plan
    first: Any = shrink(MIXTURES["mixtral"](), recipe, calibration=data(), progress=False)
    again: Any = shrink(MIXTURES["mixtral"](), read, progress=False)
    for (name, one), (other_name, other) in zip(first.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other_name and torch.equal(one, other), name


def test_experts_and_single_weights_in_one_run() -> None:
    zeros = {"prune": {"what": "weights", "method": "magnitude", "sparsity": 0.5}}
    model: Any = shrink(MIXTURES["mixtral"](), {"steps": [EXPERTS, zeros]}, calibration=data(), progress=False)
    ids = tokens(3, 14)
    for block in bind(model).blocks:
        assert block.experts.count == 2
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(block.experts.module, name)
            assert weight.shape[0] == 2 and 0.4 < float((weight == 0).float().mean()) < 0.6
    assert model.config.num_local_experts == 2 and torch.isfinite(logits(model, ids)).all()


def test_recipes_say_what_goes_together() -> None:
    with pytest.raises(RecipeError, match=r"prune\.blocks goes with what: depth; for experts give ratio or experts"):
        make_plan(MIXTURES["mixtral"](), {"steps": [{"prune": {**EXPERTS["prune"], "experts": None, "blocks": 1}}]})
    with pytest.raises(RecipeError, match="did you mean 'reap'"):
        make_plan(MIXTURES["mixtral"](), {"steps": [{"prune": {**EXPERTS["prune"], "method": "reep"}}]})
    with pytest.raises(RecipeError, match=r"experts must be a whole number"):
        make_plan(MIXTURES["mixtral"](), {"steps": [{"prune": {**EXPERTS["prune"], "experts": 1.5}}]})
