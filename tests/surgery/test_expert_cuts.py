"""Experts taken out: the same logits as with their router's logits at minus infinity, in every form and family."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.cases import tokens
from conformance.cases_mixtures import MIXTURES, MORE, count_of
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_shrink.architectures import bind
from hf_shrink.errors import ArchitectureError
from hf_shrink.plan import BlockPlan, Plan, StackPlan
from hf_shrink.runtime.experts import separate_experts
from hf_shrink.surgery import apply_structure, check_plan

every_mixture = pytest.mark.parametrize("name", MIXTURES)


def sparse(model: PreTrainedModel) -> list[Any]:
    return [block for block in bind(model).blocks if block.experts is not None]


def plan_of(model: PreTrainedModel, left: int, **more: Any) -> Plan:
    """Other experts in every block, `left` of them."""
    blocks = {}
    for block in sparse(model):
        kept = torch.randperm(block.experts.count, generator=torch.Generator().manual_seed(block.index))[:left]
        blocks[block.index] = BlockPlan(experts=tuple(sorted(kept.tolist())), **more)
    count = len(bind(model).stack("decoder").blocks)
    return Plan(model.config.model_type, {"decoder": StackPlan(tuple(range(count)), blocks)})


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


@contextmanager
def masked_routers(model: PreTrainedModel, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Logits of the experts that the plan removes are minus infinity."""
    gone = {}
    for block in sparse(model):
        router = model.get_submodule(block.routers[0])
        gone[id(router.weight)] = sorted(
            set(range(block.experts.count)) - set(plan.stacks["decoder"].blocks[block.index].experts)
        )
    real = F.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = real(x, weight, bias)
        return out if id(weight) not in gone else out.index_fill(-1, torch.tensor(gone[id(weight)]), -torch.inf)

    with monkeypatch.context() as patch:
        patch.setattr(F, "linear", linear)
        patch.setattr(nn.functional, "linear", linear)
        yield


@pytest.mark.parametrize("name", MORE)
def test_cut_equals_masked_where_routers_correct_their_scores_or_choose_groups(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = MORE[name](), tokens(3, 14)
    grouped = name == "glm4_moe"
    plan = plan_of(model, 3)
    if grouped:  # two of each group of three
        kept = {index: BlockPlan(experts=(0, 2, 3, 4)) for index in plan.stacks["decoder"].blocks}
        plan = Plan(name, {"decoder": StackPlan((0, 1), kept)})
    dense, masked_model = logits(model, ids), copy.deepcopy(model)
    for block in sparse(masked_model):
        gone = sorted(set(range(block.experts.count)) - set(plan.stacks["decoder"].blocks[block.index].experts))
        correction = getattr(masked_model.get_submodule(block.routers[0]), "e_score_correction_bias", None)
        if correction is not None:
            correction[gone] = -torch.inf
    with masked_routers(masked_model, plan, monkeypatch):
        masked = logits(masked_model, ids)
    check_plan(model, plan)
    apply_structure(model, plan)
    assert (masked - dense).abs().max() > 1e-3
    torch.testing.assert_close(logits(model, ids), masked, rtol=1e-5, atol=1e-5)
    assert model.config.num_local_experts == (4 if grouped else 3) and model.config.num_experts_per_tok == 2
    if grouped:
        for experts in ((0, 1, 2, 3), (0, 3)):
            blocks = {1: BlockPlan(experts=experts)}
            with pytest.raises(ArchitectureError, match="the same number of experts in each group, at least 2"):
                apply_structure(MORE[name](), Plan(name, {"decoder": StackPlan((0, 1), blocks)}))


def test_a_router_that_ranks_a_single_group_keeps_two_experts() -> None:
    """It ranks groups by their two best experts, of which there must be two."""
    model, ids = MORE["dots1"](), tokens(3, 14)
    assert model.config.n_group == 1
    apply_structure(model, plan_of(model, 2))
    assert torch.isfinite(logits(model, ids)).all()
    with pytest.raises(ArchitectureError, match="the same number of experts in each group, at least 2"):
        apply_structure(MORE["dots1"](), plan_of(MORE["dots1"](), 1))


@every_mixture
@pytest.mark.parametrize("left", [1, 2, 3])  # a token goes to two experts, or to the one that is left
@pytest.mark.parametrize("apart", [False, True], ids=["3D", "apart"])
def test_cut_equals_masked(name: str, left: int, apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = MIXTURES[name](), tokens(3, 14)
    plan = plan_of(model, left)
    dense = logits(model, ids)
    with masked_routers(model, plan, monkeypatch):
        masked = logits(model, ids)
    if apart:
        separate_experts(model)
    before = sum(p.numel() for p in model.parameters())
    apply_structure(model, plan)
    cut = logits(model, ids)
    assert (masked - dense).abs().max() > 1e-2
    torch.testing.assert_close(cut, masked, rtol=1e-5, atol=1e-5)
    experts = bind(model).blocks[0].experts
    assert experts.count == left
    each = sum(a * b for a, b in experts.shapes.values()) + model.config.hidden_size
    assert before - sum(p.numel() for p in model.parameters()) == each * (count_of(name) - left) * len(sparse(model))
    assert (model.config.num_experts, model.config.num_experts_per_tok) == (left, min(left, 2))


def test_experts_cut_while_apart_go_back_without_what_was_cut() -> None:
    model, ids = MIXTURES["mixtral"](), tokens(3, 14)
    expected = copy.deepcopy(model)
    plan = plan_of(model, 2)
    apply_structure(expected, plan)
    undo = separate_experts(model)
    apply_structure(model, plan)
    undo()
    assert model.model.layers[0].mlp.experts.gate_up_proj.shape[0] == 2
    torch.testing.assert_close(logits(model, ids), logits(expected, ids), rtol=1e-5, atol=1e-5)


@every_mixture
def test_saved_and_loaded_with_the_loss_that_balances_experts(name: str, tmp_path: Path) -> None:
    model, ids = MIXTURES[name](), tokens(3, 14)
    apply_structure(model, plan_of(model, 2))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        ours, stock = (m(ids, labels=ids, output_router_logits=True) for m in (model, loaded))
    torch.testing.assert_close(ours.aux_loss, stock.aux_loss)
    assert ours.aux_loss > 0
    assert ours.router_logits[0].shape[-1] == 2
    settings = {"do_sample": False, "max_new_tokens": 4, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **settings), loaded.generate(ids, **settings))


@pytest.mark.parametrize("apart", [False, True], ids=["3D", "apart"])
def test_a_twin_merged_into_its_other_changes_nothing(apart: bool) -> None:
    """Two experts with the same weights, channels in another order: whatever their shares, the mean is the expert."""
    model, ids = MIXTURES["mixtral"](), tokens(3, 14)
    with torch.no_grad():
        for layer in model.model.layers:
            experts, channels = layer.mlp.experts, layer.mlp.experts.down_proj.shape[-1]
            order = torch.randperm(channels, generator=torch.Generator().manual_seed(1))
            experts.gate_up_proj[3] = experts.gate_up_proj[1][torch.cat([order, order + channels])]
            experts.down_proj[3] = experts.down_proj[1][:, order]
    plan = Plan("mixtral", {"decoder": StackPlan((0, 1), dict.fromkeys((0, 1), BlockPlan(experts=(0, 1, 2))))})
    merging = Plan(
        "mixtral",
        {"decoder": StackPlan((0, 1), dict.fromkeys((0, 1), BlockPlan(experts=(0, 1, 2), merges=((3, 1, 0.3),))))},
    )
    dropped, found = copy.deepcopy(model), copy.deepcopy(model)
    if apart:
        separate_experts(found)
    apply_structure(dropped, plan)
    apply_structure(found, merging)
    torch.testing.assert_close(logits(found, ids), logits(dropped, ids), rtol=1e-5, atol=1e-5)
    other = dataclasses.replace(BlockPlan(experts=(0, 1, 2)), merges=((3, 2, 0.3),))
    apply_structure(model, Plan("mixtral", {"decoder": StackPlan((0, 1), {0: other, 1: other})}))
    assert (logits(model, ids) - logits(dropped, ids)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({0: BlockPlan(experts=(0, 1)), 1: BlockPlan(experts=(0, 1, 2))}, r"as many in each, not \[2, 3\]"),
        ({0: BlockPlan(experts=(0, 1))}, r"as many in each, not \[2, 4\]"),
        ({0: BlockPlan(experts=()), 1: BlockPlan(experts=())}, "nothing would be left of its experts"),
        ({0: BlockPlan(experts=(1, 4)), 1: BlockPlan(experts=(1, 4))}, "numbers below 4"),
        (dict.fromkeys((0, 1), BlockPlan(experts=(0, 1), merges=((1, 0, 0.5),))), r"\(1, 0, 0\.5\) does not"),
        (dict.fromkeys((0, 1), BlockPlan(experts=(0, 1), merges=((2, 0, 0.6), (3, 0, 0.6)))), "more than 1"),
    ],
)
def test_plans_that_cannot_be_are_refused(blocks: dict[int, BlockPlan], message: str) -> None:
    with pytest.raises(ArchitectureError, match=message):
        apply_structure(MIXTURES["mixtral"](), Plan("mixtral", {"decoder": StackPlan((0, 1), blocks)}))


def test_blocks_without_experts_lose_none() -> None:
    model = MIXTURES["qwen3_moe"]()
    plan = Plan("qwen3_moe", {"decoder": StackPlan((0, 1), {0: BlockPlan(experts=(0,)), 1: BlockPlan(experts=(0,))})})
    for what in (check_plan, apply_structure):
        with pytest.raises(ArchitectureError, match=r"layers\.1 has no experts"):
            what(model, plan)
