"""What each of several budgets buys: one measurement of the model, a plan for every budget, and how good each is."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from hf_shrink.calibration.data import CalibrationData, calibration_batches
from hf_shrink.errors import RecipeError
from hf_shrink.evaluation import evaluate_model
from hf_shrink.front import Front, Point
from hf_shrink.pipeline.budget import by_part, described
from hf_shrink.pipeline.recipes import BUDGET_RECIPE, RecipeLike, load_recipe
from hf_shrink.pipeline.searching import Searching
from hf_shrink.pipeline.shrinking import Job, evaluating
from hf_shrink.recipe import Budget
from hf_shrink.recipe.budget import budget_data
from hf_shrink.reporting.progress import Progress, silence
from hf_shrink.residence import at_home
from hf_shrink.search.choose import Chosen
from hf_shrink.search.levers import paid, paid_in_all, uniform
from hf_shrink.search.measured import MeasuredAssignments
from hf_shrink.search.options import Assignment, Problem
from hf_shrink.sharding import ranks, together


def make_front(
    model: nn.Module,
    recipe: RecipeLike,
    budgets: Sequence[str],
    *,
    tokenizer: Any = None,
    calibration: Any = None,
    seed: int = 0,
    progress: bool = True,
) -> Front:
    """Plans for several budgets on one model, beside the dense model and the same bits everywhere.

    The model is measured once for all budgets, and left as it was. Quality is measured on the recipe's `evaluation`
    data, with weights that are compressed one by one, which is a little worse than what a run makes of a plan.

    Args:
        recipe: with a budget of the same resource; each of `budgets` takes its place.
        budgets: in the form of `--budget`, all about one resource: "30%", "120MB", "latency:60%", "memory:500MB".
        tokenizer, calibration, seed, progress: as of `make_plan`.

    Raises:
        RecipeError: a budget cannot be met, the dense model keeps it, or they are about different resources or
            contexts.
    """
    loaded = load_recipe(recipe)
    if loaded.budget is None:
        raise RecipeError(
            f"a sweep goes over budgets: leave the recipe out, or give one with a budget ({BUDGET_RECIPE})"
        )
    asked = [(text, Budget.from_dict(budget_data([text]))) for text in dict.fromkeys(budgets)]
    resources = {key for _, budget in asked for key in budget.resources}
    if len(resources) != 1:
        raise RecipeError(f"a sweep is over one resource, not over {' and '.join(sorted(resources)) or 'none'}")
    if others := set(loaded.budget.resources) - resources:
        raise RecipeError(
            f"the sweep's budgets take the place of the recipe's ({loaded.budget}), so that nothing would limit "
            f"{' and '.join(sorted(others))}; leave that out of the recipe, or plan its budgets one by one"
        )
    if "memory" in resources:
        asked = [(text, replace(budget, context=budget.context or loaded.budget.context)) for text, budget in asked]
    if len({budget.context for _, budget in asked}) > 1:
        raise RecipeError(
            "a sweep counts the KV cache of one number of tokens; give all budgets the same, such as "
            "memory:40%@4096,memory:60%@4096"
        )
    with at_home(model), together(), silence(), evaluating(model):
        wanted = replace(loaded, budget=asked[0][1])
        job = Job(model, wanted, tokenizer, calibration, seed, Progress(quiet=not progress))
        assert job.recipe is not None
        with Searching.on(model, job.recipe, (), seed, job.show) as search:
            for _, budget in asked:
                search.check(budget)
        make = functools.partial(
            calibration_batches,
            job.recipe.evaluation,
            model=model,
            tokenizer=tokenizer,
            seed=seed,
            purpose="evaluation",
            progress=job.show,
        )
        held_out = ranks().on_first(make)
        job.exclude = held_out.texts(tokenizer) if job.recipe.evaluation.data != "self" else None
        with Searching.on(model, job.recipe, job.data().batches, seed, job.show) as search:
            front = _Sweep(search, held_out).front(resources.pop(), asked)
        job.show.close()
    return front


@dataclass
class _Sweep:
    search: Searching
    held_out: CalibrationData

    def front(self, resource: str, asked: Sequence[tuple[str, Budget]]) -> Front:
        search, started = self.search, time.perf_counter()
        problem = search.problem(search.sensitivity, asked[0][1].timed)
        sensed = time.perf_counter()
        measure = search.measured(problem, self.held_out.batches)
        programmes = [search.programme(budget, problem) for _, budget in asked]
        context = programmes[0].limits.context
        dense: Assignment = (0,) * len(problem.groups)
        points = [self._point("dense", "dense", problem, measure, dense, context)]
        for bits in search.spec.bits:
            same = uniform(problem, bits)
            if same is not None:
                points.append(self._point(f"W{bits}", "uniform", problem, measure, same, context))
        planning = 0.0
        for (text, budget), programme in zip(asked, programmes, strict=True):
            since = time.perf_counter()
            cast_only = search.casts and search.needs_nothing(budget)
            chosen = Chosen(dense, 0.0) if cast_only else search.choose(programme, rehearsed=False)
            planning += time.perf_counter() - since
            point = self._point(text, "plan", problem, measure, chosen.assignment, context)
            by_group = paid(problem, chosen.assignment)
            plan = json.loads(described(problem, programme.limits, chosen).to_json())
            points.append(replace(point, paid=paid_in_all(by_group), by_group=by_group, plan=plan))
        source = str(getattr(search.model.config, "_name_or_path", "") or type(search.model).__name__)
        seconds = {"sensitivity": sensed - started, "plans": planning, "in all": time.perf_counter() - started}
        worth = by_part(search.sensitivity, search.binding)
        return Front(source, resource, tuple(points), self.held_out.description, context, seconds, worth)

    def _point(
        self,
        name: str,
        kind: Any,
        problem: Problem,
        measure: MeasuredAssignments,
        assignment: Assignment,
        context: int,
    ) -> Point:
        """A point with its quality on the held-out data."""
        [kl] = measure.divergences(assignment, [assignment], None)
        with measure.installed(assignment):
            found = evaluate_model(
                self.search.model, self.held_out, metrics=("perplexity",), progress=self.search.progress
            )
        perplexity = found["model"].get("perplexity")
        cost = problem.cost(assignment)
        return Point(
            name,
            kind,
            cost.bytes,
            cost.memory(context),
            kl,
            None if perplexity is None else perplexity["value"],
            dict(cost.seconds),
            problem.damage(assignment),
        )
