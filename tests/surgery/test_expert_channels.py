"""Channels taken out of experts: the same logits as with them masked, in every form and family, saved and loaded."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.cases import tokens
from conformance.cases_mixtures import MIXTURES, MORE
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_shrink.architectures import bind
from hf_shrink.errors import ArchitectureError
from hf_shrink.plan import BlockPlan, Plan, StackPlan
from hf_shrink.runtime.experts import separate_experts
from hf_shrink.surgery import apply_structure, check_plan, consumer_cuts, cut_shapes, is_uneven

every_mixture = pytest.mark.parametrize("name", [*MIXTURES, *MORE])
KEYS = {"mixtral": "intermediate_size", "olmoe": "intermediate_size", "flex_olmo": "intermediate_size"}


def build(name: str) -> PreTrainedModel:
    return {**MIXTURES, **MORE}[name]()


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def sparse(model: PreTrainedModel) -> list[Any]:
    return [block for block in bind(model).blocks if block.experts is not None]


def plan_of(model: PreTrainedModel, left: dict[int, int]) -> Plan:
    """Other channels of every expert, so many of each block's by its index."""
    blocks = {}
    for block in sparse(model):
        draw = torch.Generator().manual_seed(block.index)
        kept = [torch.randperm(block.experts.channels, generator=draw) for _ in range(block.experts.count)]
        channels = tuple(tuple(sorted(own[: left[block.index]].tolist())) for own in kept)
        blocks[block.index] = BlockPlan(expert_channels=channels)
    count = len(bind(model).stack("decoder").blocks)
    return Plan(model.config.model_type, {"decoder": StackPlan(tuple(range(count)), blocks)})


def masked(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """A copy in which nothing reads the channels that the plan removes."""
    found = copy.deepcopy(model)
    for block in sparse(found):
        own = plan.stacks["decoder"].blocks.get(block.index)
        down = block.experts.module.get_parameter(block.experts.spec.down_fused)
        for expert, kept in enumerate(own.expert_channels if own is not None else ()):
            gone = sorted(set(range(block.experts.channels)) - set(kept))
            down.data[expert][:, gone] = 0
    return found


@every_mixture
@pytest.mark.parametrize("apart", [False, True], ids=["3D", "apart"])
@pytest.mark.parametrize("even", [True, False], ids=["even", "uneven"])
def test_cut_equals_masked(name: str, apart: bool, even: bool, tmp_path: Path) -> None:
    model, ids = build(name), tokens(3, 14)
    plan = plan_of(model, {0: 8, 1: 8} if even else {0: 8, 1: 16})
    expected, dense = logits(masked(model, plan), ids), logits(model, ids)
    undo = separate_experts(model) if apart else lambda: None
    before = sum(p.numel() for p in model.parameters())
    check_plan(model, plan)
    gone = sum(
        block.experts.count * block.experts.channel_parameters * (block.experts.channels - len(own.expert_channels[0]))
        for block in sparse(model)
        for own in [plan.stacks["decoder"].blocks[block.index]]
    )
    apply_structure(model, plan)
    assert (expected - dense).abs().max() > 1e-2
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-5, atol=1e-5)
    assert before - sum(p.numel() for p in model.parameters()) == gone > 0
    undo()
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-5, atol=1e-5)
    for block in sparse(model):
        left = len(plan.stacks["decoder"].blocks[block.index].expert_channels[0])
        assert block.experts.channels == left == block.experts.module.intermediate_dim
    says = name not in ("glm4_moe", "dots1") and len({block.experts.channels for block in sparse(model)}) == 1
    assert is_uneven(model) is not says
    if says:
        assert getattr(model.config, KEYS.get(name, "moe_intermediate_size")) == 8

    model.save_pretrained(tmp_path)
    if says:
        loaded = type(model).from_pretrained(tmp_path)
        assert torch.equal(logits(loaded, ids), logits(model, ids))
    else:
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # by stock; `shrink` saves what only we load
            type(model).from_pretrained(tmp_path)


@every_mixture
def test_what_matrices_become(name: str) -> None:
    model = build(name)
    plan = plan_of(model, {0: 8, 1: 8})
    whole = {block.path: block for block in sparse(model)}
    said = {b.path: cut_shapes(b, plan.stacks["decoder"].blocks[b.index]) for b in whole.values()}
    read = {b.path: consumer_cuts(b, plan.stacks["decoder"].blocks[b.index]) for b in whole.values()}
    separate_experts(model)
    apply_structure(model, plan)
    for block in sparse(model):
        found = {p: m for p in block.experts.matrices for m in [model.get_submodule(p)]}
        assert said[block.path] == {path: (m.out_features, m.in_features) for path, m in found.items()}
        downs = {path for path, role in block.experts.matrices.items() if role == "down"}
        assert read[block.path].keys() == downs
        for path in downs:
            expert = int(path.split(".")[-2])
            kept = plan.stacks["decoder"].blocks[block.index].expert_channels[expert]
            assert read[block.path][path].tolist() == list(kept)


@pytest.mark.parametrize("apart", [False, True], ids=["3D", "apart"])
def test_experts_and_channels_of_those_that_stay(apart: bool) -> None:
    model, ids = build("mixtral"), tokens(3, 14)
    plan = plan_of(model, {0: 8, 1: 8})
    both = {i: dataclasses.replace(b, experts=(1, 3)) for i, b in plan.stacks["decoder"].blocks.items()}
    found, expected = copy.deepcopy(model), masked(model, plan)
    experts_alone = dict.fromkeys((0, 1), BlockPlan(experts=(1, 3)))
    apply_structure(expected, Plan("mixtral", {"decoder": StackPlan((0, 1), experts_alone)}))
    if apart:
        separate_experts(found)
    apply_structure(found, Plan("mixtral", {"decoder": StackPlan((0, 1), both)}))
    torch.testing.assert_close(logits(found, ids), logits(expected, ids), rtol=1e-5, atol=1e-5)
    text = Plan("mixtral", {"decoder": StackPlan((0, 1), both)}).to_json()
    assert Plan.from_json(text).stacks["decoder"].blocks == both


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (BlockPlan(expert_channels=((0, 1), (0, 1), (0, 1), (0,))), r"as many of each, not \[1, 2\]"),
        (BlockPlan(expert_channels=((0, 1), (0, 1))), "has 4 experts, and the plan says of 2"),
        (BlockPlan(expert_channels=((),) * 4), "nothing would be left of its channels"),
        (BlockPlan(expert_channels=((0, 80),) * 4), "numbers below 80"),
        (BlockPlan(expert_channels=((0, 1, 2),) * 4), "would have 3 channels; their products need a multiple of 8"),
    ],
)
def test_plans_that_cannot_be_are_refused(block: BlockPlan, message: str) -> None:
    plan = Plan("mixtral", {"decoder": StackPlan((0, 1), {0: block})})
    with pytest.raises(ArchitectureError, match=message):
        check_plan(build("mixtral"), plan)
    with pytest.raises(ArchitectureError, match=message):
        apply_structure(build("mixtral"), plan)


def test_blocks_without_experts_lose_no_channels_of_any() -> None:
    plan = Plan("qwen3_moe", {"decoder": StackPlan((0, 1), {1: BlockPlan(expert_channels=((0,),) * 5)})})
    with pytest.raises(ArchitectureError, match=r"layers\.1 has no experts whose channels"):
        apply_structure(build("qwen3_moe"), plan)
