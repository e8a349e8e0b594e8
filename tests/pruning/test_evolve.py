"""Evolution: never worse than its greedy start on what it measured, repeatable, and it finds what there is."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, tiny_llama

from hf_shrink.architectures import bind
from hf_shrink.errors import RecipeError
from hf_shrink.pruning.base import DEPTH, Look
from hf_shrink.pruning.goal import Goal
from hf_shrink.pruning.items import Items
from hf_shrink.pruning.measure import MeasuredModel
from hf_shrink.pruning.plan_depth import plan_depth
from hf_shrink.recipe import PruneStep

SETTINGS = {"generations": 6, "offspring": 4, "tokens": 60, "predictions": 60}

SMALL = {"tokens": 30, "predictions": 30}  # as the greedy start looks


def data() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, VOCABULARY, (3, 20), generator=generator)}]


def problem(step: PruneStep, **changes: Any) -> MeasuredModel:
    model = tiny_llama(**changes)
    items = Items(model, bind(model), step.parts)
    return MeasuredModel(model, items, data(), 0, lambda *_: None, Goal(step, items))


def chosen(step: PruneStep, blocks: int, **options: Any) -> tuple[list[int], float]:
    method = DEPTH.build("evolve", {**SETTINGS, **options})
    found = list(method.removals(problem(step, num_hidden_layers=blocks)))
    return [removal.item for removal in found], found[-1].damage


STEP = PruneStep("depth", "evolve", blocks=3)


def test_it_ends_at_the_best_set_where_it_can_try_them_all() -> None:
    items, damage = chosen(STEP, 6, generations=30)
    measured = problem(STEP, num_hidden_layers=6)
    sets = [list(s) for s in itertools.combinations(range(6), 3)]
    every = measured.divergences([], sets, Look(60, 60, fast=True))
    assert items == sets[every.index(min(every))]
    assert damage == pytest.approx(min(every), rel=1e-2)  # other prefixes, other roundings where products are bfloat16


def test_more_generations_are_never_worse_and_repeat() -> None:
    damages = [chosen(STEP, 8, generations=n)[1] for n in (1, 4, 8)]
    assert damages == sorted(damages, reverse=True)
    assert chosen(STEP, 8, generations=4) == chosen(STEP, 8, generations=4)
    greedy = [r.item for r in DEPTH.build("kl_greedy", SMALL).removals(problem(STEP, num_hidden_layers=8))]
    start, damage = chosen(STEP, 8, generations=None, minutes=0)
    assert start == sorted(greedy) and damages[0] <= damage


def test_sets_of_parts_keep_their_size_and_the_attention_of_the_first_block() -> None:
    step = PruneStep("depth", "evolve", ratio=0.4, parts="any")
    model = tiny_llama(num_hidden_layers=5)
    items = Items(model, bind(model), "any")
    found, _ = chosen(step, 5, generations=8)
    greedy = [r.item for r in DEPTH.build("kl_greedy", SMALL).removals(problem(step, num_hidden_layers=5))]
    size = [sum(items.all[item].parameters for item in some) for some in (found, greedy)]
    assert size[0] == size[1]
    assert all(items.all[item].label != "model.layers.0 attention" for item in found)
    assert abs(size[0] / items.total - 0.4) < 0.05


@pytest.mark.parametrize("parts", ["attention", "mlp", "any"])
def test_parts_need_an_uneven_format_and_a_method_that_knows_them(parts: str) -> None:
    model = tiny_llama()
    step = PruneStep("depth", "kl_greedy", ratio=0.1, parts=parts)
    greedy = DEPTH.build("kl_greedy", {})
    with pytest.raises(RecipeError, match="set portable: false"):
        plan_depth(model, bind(model), step, greedy, data())
    with pytest.raises(RecipeError, match="removes whole blocks"):
        plan_depth(model, bind(model), step, DEPTH.build("block_influence", {}), data(), portable=False)
    plan = plan_depth(model, bind(model), step, greedy, data(), portable=False)
    kinds = {part for parts in plan.parts.values() for part in parts}
    assert kinds <= ({"attention", "mlp"} if parts == "any" else {parts}) and kinds


def test_a_block_that_loses_both_parts_goes_as_a_whole() -> None:
    model = tiny_llama()
    model.model.layers[2].self_attn.o_proj.weight.data.zero_()
    model.model.layers[2].mlp.down_proj.weight.data.zero_()
    step = PruneStep("depth", "kl_greedy", ratio=0.25, parts="any")
    plan = plan_depth(model, bind(model), step, DEPTH.build("kl_greedy", {}), data(), portable=False)
    assert plan.kept == {"decoder": (0, 1, 3)} and not plan.parts


@pytest.mark.parametrize("wrong", [{"offspring": 0}, {"generations": 1.5}, {"minutes": -1}, {"seed": "x"}])
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        DEPTH.build("evolve", wrong)
