"""Features that know nothing of each other in one run: mixtures and image towers, learning, tuning, 8-bit schemes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import cases_mixtures
from conformance.cases import CASES
from conformance.cases_mixtures import MIXTURES
from image_batches import batches_for
from tiny import QUICK_GPTQ
from torch import Tensor, nn

from hf_shrink import shrink
from hf_shrink.architectures import bind
from hf_shrink.recipe import Recipe
from hf_shrink.runtime.linear import CompressedLinear

Inputs = dict[str, Tensor]
EIGHT: dict[str, Any] = {"strategy": "channel", "group_size": None}


def run(model: Any, batches: list[Inputs], **step: Any) -> Any:
    body = {"method": "gptq", "scheme": "W3A16", "group_size": 16, **step}
    body |= QUICK_GPTQ if body["method"] == "gptq" else {}
    asked = {"portable": False, "steps": [{"quantize": body}]}
    return shrink(copy.deepcopy(model), asked, calibration=batches, progress=False)


def logits(model: nn.Module, batch: Inputs) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def error(model: nn.Module, dense: nn.Module, batches: list[Inputs]) -> float:
    pairs = [(logits(model, batch), logits(dense, batch)) for batch in batches]
    return sum(float((a - b).square().mean() / b.square().mean()) for a, b in pairs) / len(pairs)


def packed(model: nn.Module) -> dict[str, CompressedLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, CompressedLinear)}


def same_again(model: Any, folder: Path, batches: list[Inputs]) -> None:
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder).eval()
    assert packed(loaded).keys() == packed(model).keys()
    for batch in batches:
        assert torch.equal(logits(loaded, batch), logits(model, batch))


@pytest.mark.parametrize(
    ("name", "step"),
    [("mixtral", {"method": "learned"}), ("qwen2_moe", {"method": "rtn", "tune": {"steps": 20}})],
    ids=["learn", "tune"],
)
def test_experts_are_trained(name: str, step: dict[str, Any], tmp_path: Path) -> None:
    dense, batches = MIXTURES[name](), cases_mixtures.data()
    start = run(dense, batches, method="gptq" if step["method"] == "learned" else "rtn", starved_experts="rtn")
    trained = run(dense, batches, **step, starved_experts="rtn")
    assert packed(trained).keys() == packed(start).keys()
    experts = [path for path in packed(start) if ".experts." in path]
    assert experts
    moved = [p for p in experts if not torch.equal(packed(start)[p].weight, packed(trained)[p].weight)]
    assert len(moved) > len(experts) / 2
    assert error(trained, dense, batches) < error(start, dense, batches)
    same_again(trained, tmp_path, batches)


@pytest.mark.parametrize("method", ["rtn", "gptq", "hqq"])
@pytest.mark.parametrize("scheme", ["W8A8", "FP8A16"])
def test_experts_in_eight_bits(scheme: str, method: str, tmp_path: Path) -> None:
    dense, batches = MIXTURES["qwen3_moe"](), cases_mixtures.data()
    model = run(dense, batches, scheme=scheme, method=method, **EIGHT)
    assert {module.scheme.name for module in packed(model).values()} == {scheme}
    assert any(".experts." in path for path in packed(model))
    assert 0 < error(model, dense, batches) < (5e-3 if scheme == "W8A8" else 3e-2)
    same_again(model, tmp_path, batches)


@pytest.mark.parametrize(
    ("scheme", "method"), [("W8A8", "rtn"), ("FP8A16", "gptq"), ("W8A8", "learned"), ("FP8A16", "learned")]
)
def test_text_and_tower_in_eight_bits(scheme: str, method: str, tmp_path: Path) -> None:
    dense, batches = CASES["llava"].build(), batches_for("llava")
    overrides = {"re:.*vision_tower.*": {}, "re:.*multi_modal_projector.*": {}}
    steps = {"steps": 10} if method == "learned" else {}
    model = run(dense, batches, scheme=scheme, method=method, overrides=overrides, **EIGHT, **steps)
    tower = {path for block in bind(dense).towers[0].blocks for path in block.roles}
    assert tower < packed(model).keys() and any("projector" in path for path in packed(model))
    assert 0 < error(model, dense, batches) < (5e-3 if scheme == "W8A8" else 3e-2)
    same_again(model, tmp_path, batches)


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "FP8A16"])
def test_tuning_of_text_and_tower(scheme: str, tmp_path: Path) -> None:
    dense, batches = CASES["qwen2_vl"].build(), batches_for("qwen2_vl")
    step: dict[str, Any] = {"scheme": scheme, "method": "rtn", "overrides": {"re:.*visual.blocks.*": {}}}
    step |= EIGHT if scheme != "W4A16" else {}
    plain, tuned = (run(dense, batches, **step, **more) for more in ({}, {"tune": {"steps": 10}}))
    assert packed(plain).keys() == packed(tuned).keys()
    assert error(tuned, dense, batches) <= error(plain, dense, batches)
    same_again(tuned, tmp_path, batches)


@pytest.mark.parametrize("name", ["mixtral", "llava"])
def test_training_reaches_what_lies_before_eight_bit_weights(name: str) -> None:
    """Packed modules pass gradients on and take none."""
    mixture = name in MIXTURES
    dense = MIXTURES[name]() if mixture else CASES[name].build()
    batches = cases_mixtures.data(2) if mixture else batches_for(name)
    model = run(dense, batches, scheme="W8A8", method="rtn", **EIGHT)
    embedding = model.get_input_embeddings().weight
    model(**batches[0]).logits.float().square().mean().backward()
    assert embedding.grad is not None and float(embedding.grad.abs().sum()) > 0
    assert not any(parameter.requires_grad for module in packed(model).values() for parameter in module.parameters())


@pytest.mark.parametrize(
    "step",
    [
        {"method": "bitsandbytes", "scheme": "NF4"},
        {"method": "learned", "scheme": "FP8A16", "strategy": "channel", "group_size": None},
        {"method": "gptq", "scheme": "W8A8", "transforms": [{"smooth": {"alpha": 0.4}}], "starved_experts": "rtn"},
        {"effort": "best", "scheme": "W4A16", "overrides": {"lm_head": {"scheme": "FP8A16"}}},
    ],
)
def test_recipes_of_every_kind_go_through_their_own_form(step: dict[str, Any]) -> None:
    recipe = Recipe.from_dict({"portable": False, "steps": [{"quantize": step}]})
    again = Recipe.from_dict(recipe.to_dict())
    assert again.to_dict() == recipe.to_dict()
    first, second = recipe.quantize, again.quantize
    assert first is not None and second is not None and first.format == second.format
    if first.format is None:
        assert second.base_scheme() == first.base_scheme()
        for target, override in first.overrides.items():
            assert second.scheme_with(second.overrides[target]) == first.scheme_with(override)
