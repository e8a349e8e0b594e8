"""An output head that is tied to the embedding is rounded by its inputs, as one with a weight of its own is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_llama

from hf_shrink import shrink
from hf_shrink.architectures import bind
from hf_shrink.calibration.looked_up import EVENLY, also_looked_up
from hf_shrink.calibration.shelf import Shelf
from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.pipeline import packing
from hf_shrink.plan import Plan, Scheme
from hf_shrink.pruning.trials import Trials
from hf_shrink.quantization.base import METHODS, ModelMethod
from hf_shrink.search.measuring import Space, measure
from hf_shrink.search.options import Change, Cost, Group, Option, Problem
from hf_shrink.search.replacements import RoundedWeights, input_statistics

W4 = Scheme(4, group_size=16)
PACKED = Change({"model.embed_tokens": W4, "lm_head": W4})
FEW = torch.arange(20, 32)  # tokens that occur: what reaches the head then fills its channels unevenly


def batches(seed: int = 0, count: int = 8) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": FEW[torch.randint(len(FEW), (4, 32), generator=generator)]} for _ in range(count)]


def head_inputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model.model(**batch).last_hidden_state.flatten(0, 1) for batch in batches(1, 2)])


def rounded_head(method: str) -> tuple[Any, torch.Tensor]:
    """A dense model, and what becomes of the weight of its head and embedding alone."""
    dense, model = (tiny_llama(tie_word_embeddings=True, num_hidden_layers=2) for _ in range(2))
    quantize = {
        "method": method,
        "scheme": "W4A16",
        "group_size": 16,
        "ignore": ["re:.*layers.*"],
        "targets": ["Linear", "Embedding"],
    }
    shrink(model, {"portable": False, "steps": [{"quantize": quantize}]}, calibration=batches(), progress=False)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    return dense, model.lm_head.weight


def test_its_outputs_keep_more_than_rounding_to_nearest_leaves() -> None:
    dense, nearest = rounded_head("rtn")
    solved, inputs = rounded_head("gptq")[1], head_inputs(dense)
    weight = dense.lm_head.weight.detach()
    assert (inputs @ (solved - weight).T).square().mean() < 0.7 * (inputs @ (nearest - weight).T).square().mean()
    assert (solved - weight).square().mean() < 2 * (nearest - weight).square().mean()  # it is looked up too


def test_slices_of_it_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rounded_head("gptq")[1]
    monkeypatch.setattr(packing, "AT_ONCE", 16 * 48)
    monkeypatch.setattr(packing, "TALL", 1)
    torch.testing.assert_close(rounded_head("gptq")[1], whole, rtol=0, atol=1e-6)


def test_directions_without_inputs_count_as_well() -> None:
    seen = InputStatistics.empty(8)
    seen.add(torch.eye(8)[:2].repeat(5, 1))
    seen.finish("head")
    both = also_looked_up(seen)
    even = EVENLY * seen.mean.diagonal().mean()
    torch.testing.assert_close(both.mean, seen.mean + even * torch.eye(8))


def test_a_budget_weighs_it_as_it_will_be_rounded() -> None:
    model, rounded = rounded_head("gptq")
    binding, method = bind(model), METHODS.build("gptq", {})
    assert not isinstance(method, ModelMethod)
    space = Space((W4,), width=False, depth=False, portable=False)
    options = tuple(Option(name, Cost(2), 0.0, change) for name, change in (("dense", Change()), ("W4", PACKED)))
    problem = Problem((Group("ends", options),), Cost(1), (), (), Plan("llama", method="gptq"), {"decoder": 2})
    with torch.no_grad(), Shelf() as shelf:
        matrices = [path for block in binding.blocks for path in block.roles]
        found = measure(model, binding, space, method, matrices, batches()).outer["model.embed_tokens"][W4]
        true = Trials(model, binding, batches(), 1).divergence_of([(model.lm_head.weight, rounded)])
        statistics = input_statistics(model, binding.stacks, set(), batches(), shelf, heads=True)
        made = RoundedWeights(model, binding, problem, method, statistics, shelf).weights(0, 1)
    assert found == pytest.approx(true, rel=0.02)  # tokens were added up in another order
    assert len(made) == 1  # the parameter is the embedding's too
    nearest = rounded_head("rtn")[1]

    def apart(other: torch.Tensor) -> float:  # the walk of a run may multiply in bfloat16
        return float(((other - rounded).abs() > 0.01 * rounded.abs() + 1e-6).float().mean())

    assert apart(made["lm_head.weight"].float()) < 0.1 < 0.3 < apart(nearest)
