"""Two processes of a group share the work, hold the same bits, and come to what one process comes to."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.cases_mixtures import MIXTURES
from in_processes import in_two
from perturbing import perturbed
from tiny import QUICK_GPTQ, tiny_llama, tiny_tokenizer

from hf_shrink import evaluate_model, make_plan, shrink
from hf_shrink.calibration.dense_stream import DenseStream
from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.calibration.walk import StackWalk
from hf_shrink.sharding import share, spread

Batches = list[dict[str, torch.Tensor]]


def batches(count: int = 17, seed: int = 0) -> Batches:
    """Rows of unequal numbers, some of them padded."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for index in range(count):
        mask = torch.ones(2 + index % 2, 16, dtype=torch.long)
        mask[0, : index % 4] = 0
        found.append({"input_ids": torch.randint(3, 300, mask.shape, generator=draw), "attention_mask": mask})
    return found


def quantized(**step: Any) -> dict[str, Any]:
    return {"steps": [{"quantize": {"scheme": "W4A16", "group_size": 16, **step}}], "evaluation": {"metrics": []}}


def pruned(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"portable": False, "steps": [{"prune": step} for step in steps], "evaluation": {"metrics": []}}


RTN = {"quantize": {"scheme": "W4A16", "method": "rtn", "group_size": 16}}
BUDGET = {"budget": {"bytes": "45%"}, "search": {"bits": [2, 4], "generations": 1}, "evaluation": {"metrics": []}}
RUNS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "gptq": (lambda: two_blocks(), quantized(method="gptq")),
    "experts": (lambda: MIXTURES["mixtral"](), quantized(**QUICK_GPTQ, starved_experts="rtn")),
    "learned": (lambda: two_blocks(), quantized(method="learned", steps=8, transforms=["awq"])),
    "tuned": (lambda: two_blocks(), quantized(method="rtn", tune={"steps": 2, "tokens": 64})),
    "depth-repaired": (tiny_llama, pruned({"what": "depth", "method": "kl_greedy", "blocks": 1})),
    "width": (
        lambda: two_blocks(),
        {**pruned(), "steps": [{"prune": {"what": "width", "method": "obs", "ratio": 0.2}}, RTN]},
    ),
    "gradients": (lambda: two_blocks(), pruned({"what": "width", "method": "fisher", "ratio": 0.2})),
    "weights": (lambda: two_blocks(), pruned({"what": "weights", "method": "sparsegpt", "sparsity": 0.5})),
    "hidden": (lambda: two_blocks(), pruned({"what": "hidden", "method": "pca", "ratio": 0.2})),
    "pruned-experts": (lambda: MIXTURES["mixtral"](), pruned({"what": "experts", "method": "reap", "experts": 1})),
    "channels-of-experts": (lambda: MIXTURES["mixtral"](), pruned({"what": "width", "method": "obs", "ratio": 0.2})),
    "budget": (lambda: two_blocks(), BUDGET),
}
QUICK = ("gptq", "width", "gradients", "weights")
CASES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]


def two_blocks() -> Any:
    return tiny_llama(num_hidden_layers=2)


def run(name: str) -> dict[str, Any]:
    """What comes of a run: tensors, and what was decided and reported."""
    build, recipe = RUNS[name]
    model = shrink(build(), recipe, calibration=batches(), progress=False, optimize=False)
    report = model.shrink_report
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "plan": model.shrink_record.plan.to_json(),
        "errors": report.block_errors,
        "notes": report.notes,
        "perplexity": evaluate_model(model, batches(5, seed=1))["model"]["perplexity"]["value"],
    }


def statistics() -> dict[str, InputStatistics]:
    """Of the first two blocks of a model that changes on the way, by stages with a drift and in one pass without."""
    model = tiny_llama()
    blocks = list(model.model.layers)
    walk = StackWalk(model, blocks, batches())
    settings = {"shared": walk.share, "tokens": walk.tokens, "everything": False}
    dense = DenseStream(model, blocks, batches(), **settings)
    found: dict[str, InputStatistics] = {}
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    for place in range(2):
        matrices = {
            f"model.layers.{place}.{name}": model.get_submodule(f"model.layers.{place}.{name}") for name in names
        }

        def solve(given: dict[str, Any]) -> None:
            found.update(given)
            for path in given:
                model.get_submodule(path).weight.data.mul_(1.01)

        assert walk.advance_in_stages(matrices, solve, model.get_submodule, dense=dense) is not None
    found |= {"one pass": walk.statistics({"down": blocks[2].mlp.down_proj})["down"]}
    return found


ROWS = [{"question": word, "choices": ["sand", "rocks", word], "answer": 2} for word in ("tide", "child", "name")]
ASKED = {"tokenizer": tiny_tokenizer(), "metrics": ("accuracy", "weight_bytes")}
EXPLAINED = {"metrics": ("attribution_fidelity", "attention_fidelity")}


def job(rank: int) -> dict[str, Any]:
    dense = tiny_llama()
    small = shrink(tiny_llama(), quantized(method="rtn"), progress=False)
    return {
        "statistics": statistics(),
        "evaluation": evaluate_model(small, batches(5), baseline=dense),
        "rows": evaluate_model(perturbed(dense), ROWS, baseline=dense, **ASKED),
        "explained": evaluate_model(perturbed(dense), batches(3), baseline=dense, **EXPLAINED),
        "spread": spread(["a", "b", "c"], lambda item: (item, rank, torch.full((2,), rank))),
        "own": share(17).own,
        "few": share(1).own,
    }


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_two(job, tmp_path_factory.mktemp("two"))


def equal(a: Any, b: Any) -> bool:
    """Bit for bit, all the way down."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


@pytest.mark.parametrize("name", CASES)
def test_all_hold_the_same_bits_and_come_to_what_one_process_comes_to(name: str, tmp_path: Path) -> None:
    together, other = in_two(lambda rank: run(name), tmp_path)
    for key in together:
        assert equal(together[key], other[key]), key
    alone = run(name)
    assert together["state"].keys() == alone["state"].keys()
    if name != "budget":
        assert together["plan"] == alone["plan"]
    assert together["errors"] == pytest.approx(alone["errors"], rel=0.05)
    assert math.log(together["perplexity"]) == pytest.approx(math.log(alone["perplexity"]), abs=5e-3)


def test_statistics_are_those_of_one_process(both: list[dict[str, Any]]) -> None:
    alone, together = statistics(), both[0]["statistics"]
    assert together.keys() == alone.keys()
    drifted = 0
    for path, expected in alone.items():
        own, other = flat(expected), flat(together[path])
        assert own.keys() == other.keys()
        drifted += "measured.cross" in own
        for name, value in own.items():
            here, there = torch.as_tensor(value), torch.as_tensor(other[name])
            assert torch.allclose(there, here, rtol=1e-5, atol=1e-5 * float(here.abs().max())), (path, name)
        assert equal(other, flat(both[1]["statistics"][path]))
    assert drifted == 10


def flat(found: InputStatistics) -> dict[str, Any]:
    parts: dict[str, Any] = {"": found}
    if found.drift is not None:
        parts |= {"measured.": found.drift.measured, "held.": found.drift.held}
    return {
        f"{start}{name}": value
        for start, part in parts.items()
        for name, value in vars(part).items()
        if isinstance(value, torch.Tensor | float | int)
    }


def test_evaluation_is_the_same_to_the_bit(both: list[dict[str, Any]]) -> None:
    small = shrink(tiny_llama(), quantized(method="rtn"), progress=False)
    alone = evaluate_model(small, batches(5), baseline=tiny_llama())
    for key in ("model", "baseline", "tokens", "sequences", "context"):
        assert both[0]["evaluation"][key] == both[1]["evaluation"][key] == alone[key]
    dense = tiny_llama()
    for name, data, asked in (("rows", ROWS, ASKED), ("explained", batches(3), EXPLAINED)):
        found = evaluate_model(perturbed(dense), data, baseline=dense, **asked)
        assert both[0][name]["model"] == both[1][name]["model"] == found["model"]
        assert found["model"].keys() == set(asked["metrics"])


def test_work_is_split_and_results_are_exchanged(both: list[dict[str, Any]]) -> None:
    assert sorted(both[0]["own"] + both[1]["own"]) == list(range(17)) and abs(len(both[0]["own"]) - 8.5) < 1
    assert both[0]["few"] == both[1]["few"] == (0,)
    assert equal(both[0]["spread"], both[1]["spread"])
    assert [(item, who, where.tolist()) for item, who, where in both[0]["spread"]] == [
        ("a", 0, [0, 0]),
        ("b", 1, [1, 1]),
        ("c", 0, [0, 0]),
    ]


def test_plans_alone_are_shared_too(tmp_path: Path) -> None:
    recipe = pruned({"what": "depth", "method": "block_influence", "blocks": 2})
    plans = in_two(
        lambda rank: make_plan(tiny_llama(), recipe, calibration=batches(5), progress=False).to_json(), tmp_path
    )
    assert plans[0] == plans[1] == make_plan(tiny_llama(), recipe, calibration=batches(5), progress=False).to_json()
