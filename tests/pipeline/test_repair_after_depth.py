"""Depth pruning with refit: the stream of the pruned model comes nearer to the dense one, in every kind of model."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from conformance.cases import CASES as DECODERS
from conformance.cases_encoders import CASES as OTHERS
from tiny import VOCABULARY, tiny_llama
from torch import nn

from hf_shrink import make_plan, shrink
from hf_shrink.plan import BlockPlan, Plan, StackPlan


def data(rows: int = 24, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 200, (rows // 3, 24), generator=generator)} for _ in range(3)]


def calm() -> nn.Module:
    """A model whose blocks add little to the residual stream, as trained ones do."""
    model = tiny_llama()
    for block in model.model.layers:
        block.self_attn.o_proj.weight.data.mul_(0.3)
        block.mlp.down_proj.weight.data.mul_(0.3)
    return model


def final_states(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found = model(**batch, output_hidden_states=True)
    return (found.get("decoder_hidden_states") or found.hidden_states)[-1]


def error(model: nn.Module, dense: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    want = final_states(dense, batch)
    return float(((final_states(model, batch) - want).norm(dim=-1) / want.norm(dim=-1)).mean())


def applied(model: nn.Module, plan: Plan, batches: Any, **changes: Any) -> nn.Module:
    return shrink(copy.deepcopy(model), replace(plan, **changes), calibration=batches, progress=False)


def changed(model: nn.Module, dense: nn.Module, kept: tuple[int, ...]) -> list[str]:
    """Parameters of kept blocks that are no longer the dense ones, by the dense model's names."""
    return [
        name
        for new, old in enumerate(kept)
        for name, parameter in model.model.layers[new].named_parameters(prefix=str(old))
        if not torch.equal(parameter, dict(dense.model.layers[old].named_parameters(prefix=str(old)))[name])
    ]


PLANS: dict[str, dict[str, StackPlan]] = {
    "a gap": {"decoder": StackPlan((0, 3))},
    "the first and the last": {"decoder": StackPlan((1, 2))},
    "an attention": {"decoder": StackPlan((0, 1, 2, 3), {2: BlockPlan(removed=("attention",))})},
    "an MLP": {"decoder": StackPlan((0, 1, 2, 3), {2: BlockPlan(removed=("mlp",))})},
    "a gap and channels": {"decoder": StackPlan((0, 2, 3), {2: BlockPlan(channels=tuple(range(70)))})},
}


@pytest.mark.parametrize("name", PLANS)
def test_the_stream_comes_nearer_on_new_tokens(name: str) -> None:
    dense, plan = calm(), Plan("llama", PLANS[name], refit=False)
    without, repaired = (applied(dense, plan, data(96), repair=value) for value in (False, True))
    batch = data(seed=1)[0]
    assert error(repaired, dense, batch) < error(without, dense, batch)
    assert any("refitted to the dense model's residual stream" in note for note in repaired.shrink_report.notes)
    assert repaired.num_parameters() == without.num_parameters()
    again = applied(dense, plan, data(96), repair=True)
    assert all(torch.equal(a, b) for a, b in zip(repaired.parameters(), again.parameters(), strict=True))


def test_what_a_removed_block_did_goes_into_the_one_before_it_where_that_can_do_it() -> None:
    """Block 1 has the channels of block 2, and writes nothing itself."""
    dense = calm()
    for block in dense.model.layers[1:3]:
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.load_state_dict(dense.model.layers[2].mlp.state_dict())
        block.post_attention_layernorm.weight.data.fill_(1.0)
    dense.model.layers[1].mlp.down_proj.weight.data.zero_()
    plan = Plan("llama", {"decoder": StackPlan((0, 1, 3))}, refit=False)
    without, repaired = (applied(dense, plan, data(96), repair=value) for value in (False, True))
    batch = data(seed=1)[0]
    assert error(repaired, dense, batch) < 0.1 * error(without, dense, batch)
    found = repaired.model.layers[1].mlp.down_proj.weight
    expected = dense.model.layers[2].mlp.down_proj.weight
    assert (found - expected).norm() < 0.15 * expected.norm()


def test_nothing_changes_where_a_first_block_goes_that_did_nothing() -> None:
    """The dense stream that a block is led to is the one behind that block."""
    dense, kept = tiny_llama(), (1, 2, 3)
    dense.model.layers[0].self_attn.o_proj.weight.data.zero_()
    dense.model.layers[0].mlp.down_proj.weight.data.zero_()
    model = applied(dense, Plan("llama", {"decoder": StackPlan(kept)}, refit=False), data(96), repair=True)
    assert changed(model, dense, kept) == []


def test_three_blocks_in_front_of_a_gap_share_its_work_and_those_before_them_stay_as_they_are() -> None:
    dense, kept = tiny_llama(num_hidden_layers=7), (0, 1, 2, 3, 4, 6)
    model = applied(dense, Plan("llama", {"decoder": StackPlan(kept)}, refit=False), data(), repair=True)
    pairs = [f"{block}.{name}.weight" for block in (2, 3, 4) for name in ("self_attn.o_proj", "mlp.down_proj")]
    assert changed(model, dense, kept) == [*pairs, "6.mlp.down_proj.weight"]


@pytest.mark.parametrize("removed", [(), ("attention",)])
def test_several_blocks_make_up_for_more_than_one(removed: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_llama(num_hidden_layers=6)
    for block in dense.model.layers:
        block.self_attn.o_proj.weight.data.mul_(0.3)
        block.mlp.down_proj.weight.data.mul_(0.3)
    stack = StackPlan((0, 1, 2, 3, 5)) if not removed else StackPlan(tuple(range(6)), {3: BlockPlan(removed=removed)})
    plan, batch = Plan("llama", {"decoder": stack}, refit=False), data(192, seed=1)[0]
    errors = {}
    for most in (1, 3):
        monkeypatch.setattr("hf_shrink.pipeline.stretches.MOST", most)
        errors[most] = error(applied(dense, plan, data(384), repair=True), dense, batch)
    assert errors[3] < 0.99 * errors[1]


def test_where_several_blocks_are_too_wide_the_last_matrix_of_one_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_shrink.pipeline.stretches.WIDEST", 100)
    dense, kept = tiny_llama(num_hidden_layers=5), (0, 1, 3, 4)
    model = applied(dense, Plan("llama", {"decoder": StackPlan(kept)}, refit=False), data(), repair=True)
    assert changed(model, dense, kept) == [f"{block}.mlp.down_proj.weight" for block in (1, 3, 4)]


@pytest.mark.parametrize(
    ("name", "works"),
    [
        ("gpt2", True),
        ("gpt_neox", True),
        ("falcon_grouped", True),
        ("t5", True),
        ("whisper", True),
        ("gemma2", False),
        ("bert_masked_lm", False),
        ("opt_post_norm", False),
    ],
)
def test_every_kind_of_block_is_repaired_or_passed_over(name: str, works: bool) -> None:
    case = DECODERS.get(name) or OTHERS[name]
    dense, inputs = case.build(), case.inputs()
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(12):
        batch = dict(inputs)
        for key, value in inputs.items():
            if not value.is_floating_point() and "mask" not in key:
                batch[key] = torch.randint(5, 200, value.shape, generator=generator)
            elif value.is_floating_point():
                batch[key] = torch.randn(value.shape, generator=generator)
        batches.append(batch)
    *batches, new = batches
    from hf_shrink.architectures import bind

    stacks = {s.name: StackPlan(tuple(b.index for b in s.blocks if b.index != 1)) for s in bind(dense).stacks}
    plan = Plan(dense.config.model_type, stacks, refit=False)
    without, repaired = (applied(dense, plan, batches, repair=value) for value in (False, True))
    if works:
        assert error(repaired, dense, new) < error(without, dense, new)
    else:
        assert any("passes through a norm" in note for note in repaired.shrink_report.notes)
        assert error(repaired, dense, new) == error(without, dense, new)


def test_a_recipe_repairs_unless_told_not_to() -> None:
    steps = [{"prune": {"what": "depth", "method": "block_influence", "blocks": 1}}]
    assert make_plan(tiny_llama(), {"steps": steps}, calibration=data(), progress=False).repair
    steps[0]["prune"]["refit"] = False
    plan = make_plan(tiny_llama(), {"steps": steps}, calibration=data(), progress=False)
    assert not plan.repair and Plan.from_json(replace(plan, repair=True).to_json()).repair


def test_half_precision_stays_half_precision() -> None:
    dense = tiny_llama().to(torch.bfloat16)
    plan = Plan("llama", {"decoder": StackPlan((0, 3))}, refit=False)
    without, repaired = (applied(dense, plan, data(), repair=value) for value in (False, True))
    assert {p.dtype for p in repaired.parameters()} == {torch.bfloat16}
    batch = {"input_ids": torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(5))}
    assert error(repaired, dense, batch) < error(without, dense, batch)
