"""True divergences of assignments on a tiny model: weights in their places, blocks and parts out, all put back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from tiny import VOCABULARY, tiny_llama
from torch import Tensor

from hf_shrink.architectures import bind
from hf_shrink.calibration.predictions import divergence, keep, predictions_of
from hf_shrink.calibration.shelf import Shelf
from hf_shrink.plan import BlockPlan, Plan, Scheme
from hf_shrink.quantization.base import METHODS, ModelMethod
from hf_shrink.residence import Room
from hf_shrink.search.measured import Installed, MeasuredAssignments
from hf_shrink.search.options import Change, Cost, Group, Option, Problem
from hf_shrink.search.replacements import RoundedWeights, input_statistics
from hf_shrink.surgery import apply_structure

W4, W3 = Scheme(4, group_size=16), Scheme(3, group_size=16)
GATE, UP, DOWN, OUT = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.o_proj"


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, VOCABULARY, (4, 24), generator=generator) for _ in range(4)]
    padded = torch.ones(4, 24, dtype=torch.long)
    padded[1, 15:] = 0
    return [{"input_ids": one, "attention_mask": padded} for one in ids]


def option(name: str, change: Change) -> Option:
    return Option(name, Cost(1), 0.1, change)


def small_problem() -> Problem:
    """Of a tiny Llama of four blocks: bits, channels, heads, a part out and a block out."""
    groups = []
    for block in range(4):
        path = f"model.layers.{block}"
        attention = [
            Option("dense", Cost(2), 0.0),
            option("W4", Change({f"{path}.{OUT}": W4})),
            option("4 heads", Change({}, BlockPlan(query_heads=(0, 1, 4, 5)))),
            option("out", Change({}, BlockPlan(removed=("attention",)))),
            option("dropped", Change(dropped=True)),
        ]
        both = {f"{path}.{GATE}": W4, f"{path}.{UP}": W4, f"{path}.{DOWN}": W3}
        mlp = [
            Option("dense", Cost(2), 0.0),
            option("W4", Change(both)),
            option("48 channels", Change(both, BlockPlan(channels=tuple(range(16, 64))))),
            option("dropped", Change(dropped=True)),
        ]
        groups += [Group(f"{path} attention", tuple(attention), "decoder", block)]
        groups += [Group(f"{path} mlp", tuple(mlp), "decoder", block)]
    head = {"lm_head": Scheme(8, strategy="channel", group_size=None)}
    groups.append(Group("lm_head", (Option("dense", Cost(2), 0.0), option("W8", Change(head)))))
    links = tuple(((2 * block, 4), (2 * block + 1, 3)) for block in range(4))
    return Problem(tuple(groups), Cost(1), links, (), Plan("llama", method="gptq"), {"decoder": 4})


@pytest.fixture(scope="module")
def measured() -> tuple[MeasuredAssignments, RoundedWeights, Problem, torch.nn.Module]:
    model, problem = tiny_llama(), small_problem()
    binding = bind(model)
    method = METHODS.build("gptq", {})
    assert not isinstance(method, ModelMethod)
    paths = {path for block in binding.blocks for path in block.roles}
    with torch.no_grad():
        shelf = Shelf(Room(0))
        statistics = input_statistics(model, binding.stacks, paths, batches(), shelf)
        weights = RoundedWeights(model, binding, problem, method, statistics, shelf)
        return MeasuredAssignments(model, binding, problem, weights, batches(), 0), weights, problem, model


@torch.no_grad()
def true_divergence(model: torch.nn.Module, dense: torch.nn.Module) -> float:
    total, rows = 0.0, 0
    for batch in batches():
        reference = keep(predictions_of(dense(**batch), batch))
        total += divergence(reference, predictions_of(model(**batch), batch))
        rows += len(reference.values)
    return total / rows


def changed(model: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    for path, weight in weights.items():
        model.get_parameter(path).data = weight.float()


# Assignments: bits alone; heads and channels; a part out; a block out with bits in front of and behind it.
ASSIGNMENTS = [
    (1, 1, 0, 1, 0, 0, 0, 0, 1),
    (2, 2, 0, 0, 0, 2, 0, 0, 0),
    (0, 0, 0, 1, 3, 1, 0, 0, 0),
    (0, 1, 4, 3, 1, 2, 0, 1, 0),
]


def test_figures_are_those_of_the_model_that_a_plan_makes(
    measured: tuple[MeasuredAssignments, RoundedWeights, Problem, torch.nn.Module],
) -> None:
    measure, weights, problem, model = measured
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = measure.divergences(ASSIGNMENTS[0], [*ASSIGNMENTS, (0,) * 9], None)
    assert found[-1] == pytest.approx(0.0, abs=1e-6)
    for assignment, value in zip(ASSIGNMENTS, found, strict=False):
        other = tiny_llama()
        for group, taken in enumerate(assignment):
            changed(other, weights.weights(group, taken))
        # Masked already; so what a plan removes as a whole is all that is left to do.
        plan = problem.plan(assignment)
        stacks = {
            name: replace(s, blocks={i: BlockPlan(removed=b.removed) for i, b in s.blocks.items() if b.removed})
            for name, s in plan.stacks.items()
        }
        apply_structure(other, replace(plan, stacks=stacks))
        # products are bfloat16 where that is native
        assert value == pytest.approx(true_divergence(other, tiny_llama()), rel=0.05, abs=1e-4)
        assert value > 1e-3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class NoRoom:
    """A weight for which there is no memory."""

    def to(self, *_: object) -> Tensor:
        raise torch.OutOfMemoryError


class Failing:
    """Option 1 of a block's MLP is another `down`; option 2 another `up`, and a `gate` for which there is no room."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    def weights(self, group: int, option: int) -> Mapping[str, Tensor]:
        up, gate, down = (f"model.layers.{group // 2}.{name}.weight" for name in (UP, GATE, DOWN))
        if option == 1:
            return {down: torch.zeros_like(self._model.get_parameter(down))}
        return {up: torch.zeros_like(self._model.get_parameter(up)), gate: NoRoom()}  # type: ignore[dict-item]


@pytest.mark.parametrize("before", [0, 1])
def test_weights_for_which_there_is_no_room_leave_the_model_dense(before: int) -> None:
    model, problem = tiny_llama(), small_problem()
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = ((0, option, *(0,) * 7) for option in (before, 2))
    with pytest.raises(torch.OutOfMemoryError), Installed(model, problem, Failing(model)) as installed:
        installed.put(first)
        installed.put(second)
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())


def test_sharing_the_base_changes_no_figure(
    measured: tuple[MeasuredAssignments, RoundedWeights, Problem, torch.nn.Module],
) -> None:
    measure = measured[0]
    alone = [measure.divergences(a, [a], 32)[0] for a in ASSIGNMENTS]
    for base in (ASSIGNMENTS[3], (0,) * 9):
        assert measure.divergences(base, ASSIGNMENTS, 32) == pytest.approx(alone, rel=1e-5)
    assert measure.divergences(ASSIGNMENTS[0], [ASSIGNMENTS[0]], None)[0] != pytest.approx(alone[0], rel=1e-3)


def test_weights_are_rounded_refitted_and_masked(
    measured: tuple[MeasuredAssignments, RoundedWeights, Problem, torch.nn.Module],
) -> None:
    _, weights, _, model = measured
    cut = weights.weights(1, 2)
    down = cut[f"model.layers.0.{DOWN}.weight"]
    assert not down[:, :16].any()
    assert not down[:, 64:].any()
    assert down[:, 16:64].count_nonzero() > 0.5 * 48 * len(down)
    dense = model.get_parameter(f"model.layers.0.{DOWN}.weight")
    scales = down[:, 16:64].float().reshape(len(down), 3, 16)
    assert all(len(row.unique()) <= 8 for row in scales.reshape(-1, 16))
    assert not torch.allclose(down[:, 16:64].float(), dense[:, 16:64], rtol=0.05, atol=0.01)
    heads = weights.weights(0, 2)
    assert heads.keys() == {f"model.layers.0.{OUT}.weight"}
    assert not heads[f"model.layers.0.{OUT}.weight"][:, 32:64].any()
    assert weights.weights(0, 4) == {}
    again = weights.weights(1, 2)[f"model.layers.0.{DOWN}.weight"]
    assert torch.equal(again, down)
    assert again.data_ptr() != down.data_ptr()


def test_a_tied_weight_is_put_back() -> None:
    """It is one parameter under two paths, both of which the option names."""
    model = tiny_llama(tie_word_embeddings=True)
    both = dict.fromkeys(("model.embed_tokens", "lm_head"), W4)
    group = Group("embeddings", (Option("dense", Cost(2), 0.0), option("W4", Change(both))))
    problem = Problem((group,), Cost(1), (), (), Plan("llama", method="gptq"), {"decoder": 4})
    method = METHODS.build("gptq", {})
    assert not isinstance(method, ModelMethod)
    before = model.lm_head.weight.detach().clone()
    weights = RoundedWeights(model, bind(model), problem, method, {}, Shelf())
    measure = MeasuredAssignments(model, bind(model), problem, weights, batches(), 0)
    rounded, dense = (measure.divergences((0,), [choice], 200)[0] for choice in ((1,), (0,)))
    assert rounded > 0.01 and dense < 1e-6
    assert torch.equal(model.lm_head.weight, before) and torch.equal(model.model.embed_tokens.weight, before)
