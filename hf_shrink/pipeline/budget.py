"""From a budget to a Plan: list what may be done, see whether the budget can be met, measure, solve, refine."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from hf_shrink.architectures.binding import Binding
from hf_shrink.pipeline.searching import Searching
from hf_shrink.plan import Plan
from hf_shrink.progress import ProgressCallback
from hf_shrink.recipe import Budget, Recipe
from hf_shrink.search.choices import short
from hf_shrink.search.choose import Chosen
from hf_shrink.search.limits import Limits
from hf_shrink.search.options import Problem
from hf_shrink.search.sensitivity import Sensitivity


def plan_budget(
    model: nn.Module,
    recipe: Recipe,
    batches: Sequence[Mapping[str, Any]],
    seed: int,
    progress: ProgressCallback,
) -> tuple[Plan, list[str]]:
    """The plan for a recipe's budget, and notes. The model is left as it was.

    Raises:
        RecipeError: the budget cannot be met.
        ArchitectureError: a budget cannot be spent on the model.
        CalibrationError: no data, or numbers that are not finite.
    """
    assert recipe.budget is not None
    with Searching.on(model, recipe, batches, seed, progress) as search:
        return _planned(search, recipe.budget)


def _planned(search: Searching, budget: Budget) -> tuple[Plan, list[str]]:
    if search.casts and search.needs_nothing(budget):
        return uncompressed(search, budget), [
            f"the model keeps the budget ({budget}) once it is cast; nothing else is done"
        ]
    started = time.perf_counter()
    problem = search.problem(search.sensitivity, budget.timed)
    sensed = time.perf_counter()
    programme = search.programme(budget, problem)
    chosen = search.choose(programme)
    plan = described(problem, programme.limits, chosen)
    plan = replace(plan, search={**plan.search, "sensitivity": by_part(search.sensitivity, search.binding)})
    ended = time.perf_counter()
    notes = [f"search: {sensed - started:.1f} s to measure what everything is worth, {ended - sensed:.1f} s to choose"]
    return plan, notes


def uncompressed(search: Searching, budget: Budget) -> Plan:
    """The plan that casts the model and does nothing else; for a budget that it keeps so."""
    problem = search.sizes(budget.timed)
    return described(problem, search.limits(budget, problem), Chosen((0,) * len(problem.groups), 0.0))


def by_part(sensitivity: Sensitivity, binding: Binding) -> dict[str, dict[str, float]]:
    """Nats that it costs to round, or to leave out, each part of the model: by its name and what is done to it."""
    found = {
        name: {short(scheme): nats for scheme, nats in rounding.damage.items()}
        for name, rounding in sensitivity.rounding.items()
    }
    for path, damage in sensitivity.outer.items():
        found[path] = {short(scheme): nats for scheme, nats in damage.items()}
    for (stack, index, part), nats in sensitivity.dropped.items():
        if part is None:
            found[binding.stack(stack).blocks[index].path] = {"dropped": nats}
    return found


def described(problem: Problem, limits: Limits, chosen: Chosen) -> Plan:
    """The plan of an assignment, with what the search says of it."""
    cost = problem.cost(chosen.assignment)
    said: dict[str, Any] = {
        "limits": dict(limits.most),
        "takes": limits.taken(cost),
        "bytes": cost.bytes,
        "predicted_kl": chosen.predicted,
    }
    if chosen.measured is not None:
        said |= {"measured_kl": chosen.measured, "history": list(chosen.history), "seen": chosen.seen}
    if chosen.rehearsed:
        said |= {"rehearsed_kl": chosen.rehearsed[0], "rehearsed_others": list(chosen.rehearsed[1:])}
    return replace(problem.plan(chosen.assignment), search=said)
