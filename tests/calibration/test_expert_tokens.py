"""Experts that saw too few tokens: named before any expert is touched, or rounded without data where asked."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from conformance.cases import tokens
from conformance.cases_mixtures import data, mixtral, qwen3_moe
from torch import nn
from transformers import PreTrainedModel

from hf_shrink import shrink
from hf_shrink.architectures import bind
from hf_shrink.calibration.experts import least_tokens
from hf_shrink.calibration.walk import StackWalk
from hf_shrink.errors import CalibrationError, RecipeError
from hf_shrink.plan import Plan
from hf_shrink.recipe import QuantizeStep, Recipe
from hf_shrink.runtime import CompressedLinear
from hf_shrink.runtime.experts import separate_experts


def starving(model: PreTrainedModel, block: int, expert: int) -> PreTrainedModel:
    """The model with a router that sends nothing to one expert: its logit falls below every other one's."""
    layer = model.model.layers[block]
    weight = layer.mlp.gate.weight.data
    weight[expert] = -1000 * weight.mean(0)
    # An input that is mostly along the mean of the other rows keeps the logit of `expert` negative.
    layer.post_attention_layernorm.weight.data.zero_()
    layer.post_attention_layernorm.weight.data[0] = 1.0
    weight[:, 0] = torch.linspace(1.0, 2.0, len(weight)).square()
    weight[expert, 0] = 0.0
    model.model.embed_tokens.weight.data[:, 0] = 30.0
    return model


def recipe(**options: Any) -> dict[str, Any]:
    return {"steps": [{"quantize": {"method": "gptq", "scheme": "W4A16", "group_size": 16, **options}}]}


def test_the_least_number_grows_with_the_width() -> None:
    assert [least_tokens(width) for width in (1, 4, 5, 80, 2048)] == [1, 1, 2, 20, 512]


def test_a_starved_expert_is_named_before_any_expert_of_its_block_is_changed() -> None:
    model = starving(mixtral(), block=0, expert=2)
    dense = copy.deepcopy(model)
    with pytest.raises(CalibrationError) as error:
        shrink(model, recipe(), calibration=data(2), progress=False)
    text = str(error.value)
    assert re.search(r"model\.layers\.0\.mlp\.experts\.2 \(0\)", text)
    assert "at least 20" in text and "width 80" in text
    for remedy in ("calibration.samples", "quantize.starved_experts=rtn", "search.starved_experts=rtn", "method: rtn"):
        assert remedy in text
    experts = bind(model).blocks[0].experts
    for path in experts.matrices:
        assert isinstance(model.get_submodule(path), nn.Linear)
    fused = dense.model.layers[0].mlp.experts
    assert torch.equal(model.get_submodule(f"{experts.path}.1.w2").weight, fused.down_proj[1])


def test_starved_experts_are_rounded_to_nearest_where_asked() -> None:
    start = starving(mixtral(), block=0, expert=2)
    model: Any = shrink(copy.deepcopy(start), recipe(starved_experts="rtn"), calibration=data(2), progress=False)
    nearest: Any = shrink(copy.deepcopy(start), recipe(method="rtn"), progress=False)
    (note,) = [note for note in model.shrink_report.notes if "too few calibration tokens" in note]
    named = set(re.findall(r"(\S+experts\.\d+) \(\d+ tokens\)", note))
    assert "model.layers.0.mlp.experts.2" in named
    fed = [e for b in bind(model).blocks for e in (f"{b.experts.path}.{i}" for i in range(4)) if e not in named]
    assert fed  # the others are solved with data
    for expert in (*named, *fed):
        for own in ("w1", "w2", "w3"):
            packed, rounded = model.get_submodule(f"{expert}.{own}"), nearest.get_submodule(f"{expert}.{own}")
            assert isinstance(packed, CompressedLinear)
            assert torch.equal(packed.weight, rounded.weight) == (expert in named)


def test_zeros_alone_of_starved_experts_are_chosen_by_magnitude_where_asked() -> None:
    start = starving(mixtral(), block=0, expert=2)

    def zeros(**step: Any) -> dict[str, Any]:
        return {"steps": [{"prune": {"what": "weights", "method": "wanda", "sparsity": 0.5, **step}}]}

    with pytest.raises(CalibrationError, match=r"--set prune\.weights\.starved_experts=magnitude"):
        shrink(copy.deepcopy(start), zeros(), calibration=data(2), progress=False)
    asked = Recipe.from_dict(zeros()).with_overrides(["prune.weights.starved_experts=magnitude"])
    model: Any = shrink(copy.deepcopy(start), asked, calibration=data(2), progress=False)
    nearest: Any = shrink(copy.deepcopy(start), zeros(method="magnitude", granularity="row"), progress=False)
    notes = model.shrink_report.notes
    (note,) = [note for note in notes if "too few calibration tokens" in note]
    starved = set(re.findall(r"(\S+experts\.\d+) \(\d+ tokens\)", note))
    assert "model.layers.0.mlp.experts.2" in starved
    fed = 0
    for index, (layer, other) in enumerate(zip(model.model.layers, nearest.model.layers, strict=True)):
        for expert in range(4):
            down, simple = layer.mlp.experts.down_proj[expert], other.mlp.experts.down_proj[expert]
            assert float((down == 0).float().mean()) == 0.5
            assert torch.equal(down, simple) == (f"model.layers.{index}.mlp.experts.{expert}" in starved)
            fed += not torch.equal(down, simple)
    assert fed and sum("have no statistics, so that zeros were chosen by magnitude" in note for note in notes) == 1


def test_what_zeros_say_of_starved_experts_goes_with_nothing_else() -> None:
    zeros = {"what": "weights", "method": "wanda", "sparsity": 0.5, "starved_experts": "magnitude"}
    depth = {"what": "depth", "method": "block_influence", "blocks": 1, "starved_experts": "magnitude"}
    for steps, match in (
        ([{"prune": {**zeros, "starved_experts": "magnitud"}}], "did you mean 'magnitude'"),
        ([{"prune": depth}], r"prune\.starved_experts goes with what: weights"),
        ([{"prune": zeros}, *recipe()["steps"]], r"say quantize\.starved_experts: rtn"),
    ):
        with pytest.raises(RecipeError, match=match):
            Recipe.from_dict({"steps": steps})
    asked = Recipe.from_dict({"steps": [{"prune": zeros}]})
    assert Recipe.from_dict(asked.to_dict()) == asked


def test_a_plan_keeps_what_was_asked() -> None:
    asked = Recipe.from_dict(recipe(starved_experts="rtn"))
    assert Recipe.from_dict(asked.to_dict()) == asked
    assert asked.with_overrides(["quantize.starved_experts=error"]).quantize.starved_experts == "error"
    plan = Plan("mixtral", starved_experts="rtn")
    assert Plan.from_json(plan.to_json()).starved_experts == "rtn"
    with pytest.raises(RecipeError, match=r"starved_experts 'round'; did you mean 'rtn'"):
        QuantizeStep(starved_experts="round")  # type: ignore[arg-type]


@pytest.mark.parametrize("staged", [True, False])
def test_one_token_in_all(staged: bool) -> None:
    """Most experts see nothing; the walk goes on and gives those no statistics."""
    model = qwen3_moe()
    separate_experts(model)
    block = bind(model).blocks[0]
    matrices = {path: model.get_submodule(path) for path in block.roles}
    batch = {"input_ids": tokens(1, 1)}
    walk = StackWalk(model, [b.module for b in bind(model).blocks], [batch], starved_experts="rtn")
    found: dict[str, Any] = {}
    if staged:
        assert walk.advance_in_stages(matrices, found.update, model.get_submodule) is not None
    else:
        found = walk.statistics(matrices)
    assert len(walk.starved) == 5 and sorted(walk.starved.values()) == [0, 0, 0, 1, 1]
    assert {path for path in matrices if found.get(path) is not None} == {
        f"{block.path}.self_attn.{name}_proj" for name in "qkvo"
    }


def test_padding_is_not_counted() -> None:
    model = mixtral()
    separate_experts(model)
    block = bind(model).blocks[0]
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :11] = 0
    matrices = {path: model.get_submodule(path) for path in block.roles}
    walk = StackWalk(
        model, [b.module for b in bind(model).blocks], [{"input_ids": tokens(2, 12), "attention_mask": mask}]
    )
    with pytest.raises(CalibrationError) as error:
        walk.statistics(matrices)
    assert sum(int(count) for count in re.findall(r"\((\d+)\)", str(error.value))) == 2 * 13
