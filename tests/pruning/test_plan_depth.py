"""Which blocks go: planted idle blocks are found, and measurements agree with running the cut model from scratch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conformance.cases_encoders import CASES
from tiny import VOCABULARY, tiny_llama
from torch import Tensor, nn
from torch.nn import functional as F

from hf_shrink.architectures import bind
from hf_shrink.errors import CalibrationError, RecipeError
from hf_shrink.pruning.base import DEPTH, DepthProblem, Look, Removal
from hf_shrink.pruning.items import Items
from hf_shrink.pruning.measure import MeasuredModel
from hf_shrink.pruning.plan_depth import DepthPlan, plan_depth
from hf_shrink.recipe import PruneStep
from hf_shrink.surgery import remove_blocks

IDLE = 2
CLOSELY = Look(tokens=10_000, predictions=10_000)


def tokens(batches: int = 2, rows: int = 3, length: int = 20) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, VOCABULARY, (rows, length), generator=generator)} for _ in range(batches)]


def with_idle_block(block: int = IDLE, **changes: Any) -> nn.Module:
    model = tiny_llama(**changes)
    model.model.layers[block].self_attn.o_proj.weight.data.zero_()
    model.model.layers[block].mlp.down_proj.weight.data.zero_()
    return model


def planned(model: nn.Module, method: str, batches: Any = None, options: Any = None, **step: Any) -> DepthPlan:
    batches = tokens() if batches is None else batches
    built = DEPTH.build(method, options or {})
    return plan_depth(model, bind(model), PruneStep("depth", method, **step), built, batches)


def problem_of(model: nn.Module, batches: Any) -> MeasuredModel:
    return MeasuredModel(model, Items(model, bind(model)), batches, 0, lambda what, done, total: None)


@pytest.mark.parametrize("method", ["block_influence", "kl_greedy"])
@pytest.mark.parametrize("idle", [0, 2, 3])
def test_a_block_that_does_nothing_goes_first(method: str, idle: int) -> None:
    plan = planned(with_idle_block(idle), method, blocks=1)
    assert plan.kept == {"decoder": tuple(b for b in range(4) if b != idle)}
    assert plan.damage == {f"model.layers.{idle}": pytest.approx(0, abs=1e-5)}


@pytest.mark.parametrize("method", ["block_influence", "kl_greedy"])
def test_the_model_is_left_as_it_was_and_plans_repeat(method: str) -> None:
    model = tiny_llama()
    data, config = tokens(), model.config.to_dict()
    before = model(**data[0]).logits
    first = planned(model, method, blocks=2)
    assert first == planned(model, method, blocks=2)
    assert torch.equal(model(**data[0]).logits, before)
    assert model.config.to_dict() == config
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)


def test_divergence_is_that_of_a_model_cut_for_good() -> None:
    """The replayed prefixes change nothing: KL in float64 between dense and really cut models."""
    data = tokens()
    dense = tiny_llama(num_hidden_layers=5)
    trials = [[1, 0], [1, 2], [1, 4], [0], [2, 3]]  # the last two put back what the others share
    found = problem_of(dense, data).divergences([1], trials, CLOSELY)
    for trial, value in zip(trials, found, strict=True):
        cut = tiny_llama(num_hidden_layers=5)
        remove_blocks(cut, bind(cut).stacks[0], [b for b in range(5) if b not in trial])
        assert value == pytest.approx(divergence_between(dense, cut, data), rel=1e-4)


def divergence_between(dense: nn.Module, cut: nn.Module, data: Any) -> float:
    with torch.no_grad():
        logits = [torch.cat([model(**x, use_cache=False).logits for x in data]) for model in (dense, cut)]
    p, q = (found.double().log_softmax(-1) for found in logits)
    return float(F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean())


def test_predictions_on_some_rows_are_those_of_all_rows_there() -> None:
    """The head runs on 8 of 60 real tokens, and nothing but real ones."""
    model, [batch] = tiny_llama(), tokens(1)
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :13] = 0
    data = {**batch, "attention_mask": mask}
    widths: list[int] = []
    model.lm_head.register_forward_hook(lambda _, args, output: widths.append(output.shape[:-1].numel()))
    [found] = problem_of(model, [data]).divergences([], [[1]], Look(10_000, 8))
    assert widths[-1] == 8
    cut = tiny_llama()
    remove_blocks(cut, bind(cut).stacks[0], [0, 2, 3])
    with torch.no_grad():
        p, q = (m(**data).logits.flatten(0, 1)[mask.flatten().bool()].double().log_softmax(-1) for m in (model, cut))
    every = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    picked = torch.linspace(0, len(every) - 1, 8).long()
    assert found == pytest.approx(float(every[picked].mean()), rel=1e-4)


def test_greedy_takes_the_least_divergence_each_round() -> None:
    model, data = tiny_llama(num_hidden_layers=5), tokens()
    problem = problem_of(model, data)
    removed: list[int] = []
    for _ in range(3):
        tried = problem.candidates(removed)
        found = problem.divergences(removed, [[*removed, b] for b in tried], CLOSELY)
        removed.append(tried[found.index(min(found))])
    plan = planned(model, "kl_greedy", data, {"candidates": None, "predictions": 10_000}, blocks=3)
    assert list(plan.damage) == [f"model.layers.{b}" for b in removed]
    assert plan.kept["decoder"] == tuple(sorted(set(range(5)) - set(removed)))


def test_influence_is_one_minus_the_cosine_over_real_tokens() -> None:
    model, [batch] = tiny_llama(), tokens(1)
    mask = torch.ones_like(batch["input_ids"])
    mask[0, 11:] = 0
    mask[2, 4:] = 0
    found = problem_of(model, [{**batch, "attention_mask": mask}]).influences([])
    # The last hidden state that transformers gives is behind the final norm, so the last block is left out.
    states = model(**batch, attention_mask=mask, output_hidden_states=True).hidden_states
    for block in range(3):
        before, after = states[block][mask.bool()].double(), states[block + 1][mask.bool()].double()
        expected = 1 - (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
        assert found[block] == pytest.approx(float(expected.mean().detach()), rel=1e-5)


def test_angles_are_those_between_hidden_states() -> None:
    model, [batch] = tiny_llama(), tokens(1)
    [one, two] = problem_of(model, [batch]).angles([[1], [0, 1]], 10_000)
    states = model(**batch, output_hidden_states=True).hidden_states
    for start, found in ((1, one), (0, two)):
        before, after = states[start].double(), states[2].double()
        cosine = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
        # Products may be in bfloat16.
        assert found == pytest.approx(float((cosine.arccos() / torch.pi).mean().detach()), rel=1e-2)


@pytest.mark.parametrize(("idle", "kept"), [((1, 2), (0, 3, 4)), ((3, 4), (0, 1, 2))])
def test_a_span_is_made_of_neighbours(idle: tuple[int, int], kept: tuple[int, ...]) -> None:
    model = with_idle_block(idle[0], num_hidden_layers=5)
    model.model.layers[idle[1]].self_attn.o_proj.weight.data.zero_()
    model.model.layers[idle[1]].mlp.down_proj.weight.data.zero_()
    assert planned(model, "span", blocks=2).kept["decoder"] == kept
    model, inputs = CASES["t5"].build(), CASES["t5"].inputs()
    left = planned(model, "span", [inputs], blocks=2).kept
    assert (left["encoder"], left["decoder"]) in (
        ((0,), (0, 1, 2, 3)),
        ((0, 1, 2), (0, 1)),
        ((0, 1, 2), (0, 3)),
    )
    with pytest.raises(RecipeError, match="no further block"):
        planned(model, "span", [inputs], blocks=4)


def test_later_rounds_try_what_cost_least_before() -> None:
    model, data = tiny_llama(num_hidden_layers=5), tokens()
    tried: list[list[int]] = []
    costs: list[list[float]] = []

    class Spy(MeasuredModel):
        def divergences(self, base: Any, trials: Any, look: Any) -> Any:
            tried.append([trial[-1] for trial in trials])
            costs.append(super().divergences(base, trials, look))
            return costs[-1]

    spy = Spy(model, Items(model, bind(model)), data, 0, lambda *_: None)
    removals = DEPTH.build("kl_greedy", {"candidates": 2}).removals(spy)
    first = next(removals).item
    next(removals)
    assert tried[0] == [0, 1, 2, 3, 4]
    cheapest = sorted(tried[0], key=lambda block: costs[0][block])
    assert first == cheapest[0] and tried[1] == sorted(cheapest[1:3])


@pytest.mark.parametrize(("ratio", "left"), [(0.0, 10), (0.04, 10), (0.06, 9), (0.3, 7), (0.34, 7), (0.9, 1)])
def test_a_ratio_becomes_the_nearest_number_of_blocks(ratio: float, left: int) -> None:
    model = tiny_llama(num_hidden_layers=10)
    plan = planned(model, "block_influence", ratio=ratio)
    assert len(plan.kept["decoder"]) == left
    assert bool(plan.notes) == (abs((10 - left) / 10 - ratio) > 0.01)


@pytest.mark.parametrize("step", [{"blocks": 4}, {"ratio": 0.95}])
@pytest.mark.parametrize("method", ["block_influence", "kl_greedy"])
def test_removing_every_block_is_an_error(step: dict[str, Any], method: str) -> None:
    with pytest.raises(RecipeError, match="without blocks it needs; at most"):
        planned(tiny_llama(), method, **step)


def test_no_data_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="no calibration data"):
        planned(tiny_llama(), "block_influence", [], blocks=1)
    assert planned(tiny_llama(), "block_influence", [], blocks=0).kept == {"decoder": (0, 1, 2, 3)}


@pytest.mark.parametrize("method", ["block_influence", "kl_greedy"])
def test_not_finite_numbers_are_an_error(method: str) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.weight.data[3, 3] = float("inf")
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        planned(model, method, blocks=1)


def test_a_method_that_runs_dry_is_an_error() -> None:
    class OneOnly:
        takes_parts = False

        def removals(self, problem: DepthProblem) -> Iterator[Removal]:
            yield Removal(0, 0.0)

    model = tiny_llama()
    with pytest.raises(RecipeError, match="no further block"):
        plan_depth(model, bind(model), PruneStep("depth", "mine", blocks=2), OneOnly(), tokens())


FAMILIES = ("bert", "bert_classifier", "modernbert_masked_lm", "vit_classifier", "clip", "t5", "bart", "whisper")


@pytest.mark.parametrize("method", ["block_influence", "kl_greedy"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_model_can_be_measured(name: str, method: str) -> None:
    """One block less over all stacks; the idle one, in whichever stack it was planted."""
    model, inputs = CASES[name].build(), CASES[name].inputs()
    stack = bind(model).stacks[-1]
    block = stack.blocks[1]
    for part in block.parts:
        for slot in part.slots:
            if slot.role in ("output", "down"):
                for parameter in part.modules[slot.path].parameters():
                    parameter.data.zero_()
    post_norm = name.startswith(("bert", "bart"))  # such a block still applies its norms
    plan = planned(model, method, [inputs], blocks=1)
    assert sum(map(len, plan.kept.values())) == sum(len(s.blocks) for s in bind(model).stacks) - 1
    if not post_norm:
        assert plan.kept[stack.name] == tuple(b.index for b in stack.blocks if b.index != 1)


def test_replay_is_exact_where_blocks_hand_on_more_than_hidden_states() -> None:
    """T5: the decoder reads the encoder's output, and both hand a position bias from block to block."""
    case = CASES["t5"]
    dense, inputs = case.build(), case.inputs()
    items = Items(dense, bind(dense)).all
    numbers = [0, len(items) - 1]
    found = problem_of(dense, [inputs]).divergences([], [[n] for n in numbers], CLOSELY)
    for number, value in zip(numbers, found, strict=True):
        cut = case.build()
        stack = bind(cut).stack(items[number].stack.name)
        remove_blocks(cut, stack, [b.index for b in stack.blocks if b.index != items[number].block.index])
        assert value == pytest.approx(divergence_between(dense, cut, [inputs]), rel=1e-4)


def test_a_first_block_that_is_special_stays() -> None:
    for name in ("t5", "modernbert_masked_lm"):
        model, inputs = CASES[name].build(), CASES[name].inputs()
        most = sum(len(stack.blocks) - 1 for stack in bind(model).stacks)
        plan = planned(model, "block_influence", [inputs], blocks=most)
        assert all(kept == (0,) for kept in plan.kept.values())
