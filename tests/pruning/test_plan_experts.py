"""Which experts go: scores against a slow reference, planted idle experts, counts from ratios, and where merges go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance.cases_mixtures import MIXTURES, MORE, data
from tiny import tiny_llama
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_shrink.architectures import bind
from hf_shrink.errors import ArchitectureError, CalibrationError, RecipeError
from hf_shrink.pruning.base import EXPERTS, ExpertView
from hf_shrink.pruning.plan_experts import ExpertPlan, plan_experts
from hf_shrink.recipe import PruneStep
from hf_shrink.runtime.experts import separate_experts


class Seen:
    """Keeps what it is shown; scores experts by their number."""

    merge = False

    def __init__(self) -> None:
        self.views: list[ExpertView] = []

    def score(self, view: ExpertView) -> Tensor:
        self.views.append(view)
        return torch.arange(len(view.tokens)).double()


def planned(model: PreTrainedModel, method: Any = "reap", batches: Any = None, options: Any = None, **step: Any) -> Any:
    built = EXPERTS.build(method, options or {}) if isinstance(method, str) else method
    undo = separate_experts(model)
    try:
        return plan_experts(
            model, bind(model), PruneStep("experts", "mine", **step), built, data() if batches is None else batches
        )
    finally:
        undo()


def reference(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> list[ExpertView]:
    """Token by token in float64, from the inputs of the routers of the model's own forward."""
    layers = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    inputs: list[list[Tensor]] = [[] for _ in layers]
    for batch in batches:
        handles = [
            m.gate.register_forward_pre_hook(lambda _, args, x=x: x.append(args[0]))
            for m, x in zip(layers, inputs, strict=True)
        ]
        with torch.no_grad():
            model(**batch)
        for handle in handles:
            handle.remove()
        real = batch["attention_mask"].bool().reshape(-1)
        for x in inputs:
            x[-1] = x[-1].reshape(len(real), -1)[real]
    views = []
    for module, parts in zip(layers, inputs, strict=True):
        experts, count = module.experts, module.experts.num_experts
        tokens, mass, energy = (
            torch.zeros(count, dtype=torch.long),
            torch.zeros(count).double(),
            torch.zeros(count).double(),
        )
        logits = torch.cat(parts).double() @ module.gate.weight.double().T
        for x, row in zip(torch.cat(parts).double(), logits, strict=True):
            weights, chosen = row.softmax(-1).topk(module.gate.top_k)
            if getattr(module.gate, "norm_topk_prob", True):
                weights = weights / weights.sum()
            for weight, expert in zip(weights, chosen, strict=True):
                gate, up = (experts.gate_up_proj[expert].double() @ x).chunk(2)
                output = experts.down_proj[expert].double() @ (F.silu(gate) * up)
                tokens[expert] += 1
                mass[expert] += weight
                energy[expert] += weight * output.norm()
        views.append(ExpertView(tokens, mass, energy, F.cosine_similarity(logits.T[:, None], logits.T[None], dim=-1)))
    return views


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_views_and_scores_against_a_slow_reference(name: str) -> None:
    model = MIXTURES[name]().requires_grad_(False)
    batches = data(2)
    expected, seen = reference(model, batches), Seen()
    plan = planned(model, seen, batches, experts=1)
    assert len(seen.views) == len(expected) > 0
    for found, view in zip(seen.views, expected, strict=True):
        assert torch.equal(found.tokens, view.tokens)
        for part in ("mass", "energy", "likeness"):
            torch.testing.assert_close(getattr(found, part), getattr(view, part), rtol=1e-4, atol=1e-4)
        scores = EXPERTS.build("reap", {}).score(found)
        assert torch.allclose(scores, view.energy / view.tokens.clamp_min(1), rtol=1e-4)
        assert torch.equal(EXPERTS.build("frequency", {}).score(found), view.tokens.double())
    assert {block.experts for block in plan.blocks.values()} == {tuple(range(1, len(expected[0].tokens)))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expert_that_adds_nothing_goes_first_and_the_model_is_left_alone(dtype: torch.dtype) -> None:
    model = MIXTURES["mixtral"]()
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[2] = 0
        model.model.layers[1].mlp.experts.down_proj[0] = 0
    model.to(dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan: ExpertPlan = planned(model, experts=1)
    assert {index: block.experts for (_, index), block in plan.blocks.items()} == {0: (0, 1, 3), 1: (1, 2, 3)}
    assert all(block.merges is None for block in plan.blocks.values()) and plan.notes == []
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[key]) for key, value in before.items())
    assert planned(model, experts=1) == plan


def test_merges_go_to_the_expert_with_the_most_similar_router_and_share_by_mass() -> None:
    model = MIXTURES["mixtral"]()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.down_proj[2] = 0
            layer.mlp.gate.weight[2] = layer.mlp.gate.weight[3] * 0.9
    seen = Seen()
    planned(model, seen, experts=1)
    plan = planned(model, options={"merge": True}, experts=1)
    for block, view in zip(plan.blocks.values(), seen.views, strict=True):
        ((expert, into, share),) = block.merges
        assert block.experts == (0, 1, 3) and (expert, into) == (2, 3)
        assert share == pytest.approx(float(view.mass[2] / (view.mass[2] + view.mass[3])))


@pytest.mark.parametrize(("ratio", "left"), [(0.0, 4), (0.2, 3), (0.45, 2)])
def test_a_ratio_becomes_the_nearest_number_of_experts(ratio: float, left: int) -> None:
    model = MIXTURES["mixtral"]()
    plan = planned(model, ratio=ratio)
    assert {len(block.experts) for block in plan.blocks.values()} == ({left} if left < 4 else set())
    total = sum(p.numel() for layer in model.model.layers for p in layer.parameters())
    removed = (4 - left) * 2 * (3 * 80 * 48 + 48) / total
    assert bool(plan.notes) == (abs(removed - ratio) > 0.01)
    if plan.notes:
        assert f"removed {removed:.1%}" in plan.notes[0]


def test_experts_that_saw_few_tokens_are_named() -> None:
    model = MIXTURES["mixtral"]()
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[1] = 0
        model.model.layers[1].mlp.gate.weight[1, 0] = -50 * torch.sign(model.model.layers[1].mlp.gate.weight[0, 0])
    (note,) = planned(model, batches=data(1, length=8), experts=1).notes
    assert "fewer than 32 calibration tokens" in note and "model.layers.1.mlp.experts." in note


def test_as_many_go_from_each_group_of_a_router_that_chooses_groups() -> None:
    plan = planned(MORE["glm4_moe"](), Seen(), experts=2)
    assert [block.experts for block in plan.blocks.values()] == [(1, 2, 4, 5)]
    for step, message in (({"experts": 1}, "a multiple of 2"), ({"experts": 4}, "at most 2 can go")):
        with pytest.raises(RecipeError, match=message):
            planned(MORE["glm4_moe"](), Seen(), **step)


def test_a_router_that_ranks_a_single_group_keeps_two_experts() -> None:
    plan = planned(MORE["dots1"](), Seen(), experts=3)
    assert {block.experts for block in plan.blocks.values()} == {(3, 4)}
    with pytest.raises(RecipeError, match="remove 4 of 5 experts of a block, at most 3 can go"):
        planned(MORE["dots1"](), Seen(), experts=4)


class Wrong(Seen):
    def score(self, view: ExpertView) -> Tensor:
        return torch.full((len(view.tokens),), torch.nan)


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        ({"experts": 4}, RecipeError, r"remove 4 of 4 experts of a block, at most 3 can go \(57"),
        ({"ratio": 0.9}, RecipeError, "lower experts or ratio"),
        ({"experts": 1, "method": Wrong()}, CalibrationError, "NaN or Inf"),
        ({"experts": 1, "batches": []}, CalibrationError, "no calibration data"),
    ],
)
def test_what_cannot_be_is_refused(step: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        planned(MIXTURES["mixtral"](), **step)


def test_a_model_without_experts_says_so() -> None:
    model: nn.Module = tiny_llama()
    with pytest.raises(ArchitectureError, match="no experts"):
        planned(model, experts=1)
