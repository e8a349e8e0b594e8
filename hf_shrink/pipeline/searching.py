"""A search for what a budget buys, on one model: what may be done, what it is worth, what is best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_shrink.architectures.binding import Binding, bind
from hf_shrink.calibration.shelf import Shelf
from hf_shrink.errors import ArchitectureError, RecipeError
from hf_shrink.pipeline.rehearsal import Rehearsal, split, why_not
from hf_shrink.pipeline.targets import select
from hf_shrink.plan import Plan, Scheme
from hf_shrink.progress import ProgressCallback
from hf_shrink.pruning.samples import choose
from hf_shrink.quantization.base import METHODS, ModelMethod, QuantizationMethod
from hf_shrink.recipe import Budget, QuantizeStep, Recipe, SearchSpec
from hf_shrink.recipe.budget import LATENCIES
from hf_shrink.recipe.effort import expand
from hf_shrink.residence import Room, visited
from hf_shrink.runtime.experts import separate_experts
from hf_shrink.search.blank import blank_sensitivity
from hf_shrink.search.choose import Chosen, choose_assignment, guesses
from hf_shrink.search.costs import check_cached
from hf_shrink.search.fingerprint import sensitivity_of
from hf_shrink.search.latency import LatencyTable, cache_folder, check_timed
from hf_shrink.search.limits import Limits
from hf_shrink.search.measured import MeasuredAssignments
from hf_shrink.search.measuring import Space
from hf_shrink.search.options import Problem
from hf_shrink.search.problem import dense_cost, make_problem
from hf_shrink.search.reachable import check_reachable
from hf_shrink.search.rehearsed import NEUTRAL, USUAL, Factors, learn
from hf_shrink.search.replacements import IN_MEMORY, RoundedWeights, input_statistics
from hf_shrink.search.sensitivity import Sensitivity
from hf_shrink.search.solve import Programme

STATISTICS_TOKENS = 16_384  # that inputs are read of, for weights that are tried


@dataclass
class Searching:
    """A search on one model: what all budgets share is made once, when it is first needed.

    Args:
        recipe: with a budget; others may follow for the same `search`, calibration data and model.
        batches: of calibration.
        cache: folder of sensitivities and latencies; None: nothing is kept.
    """

    model: PreTrainedModel
    recipe: Recipe
    batches: Sequence[Mapping[str, Any]]
    seed: int
    progress: ProgressCallback
    cache: Path | None = None
    _factors: Factors | None = field(default=None, init=False)
    _weights: tuple[Problem, RoundedWeights] | None = field(default=None, init=False)
    _sizes: dict[bool, Problem] = field(default_factory=dict, init=False)

    @classmethod
    @contextmanager
    def on(
        cls,
        model: nn.Module,
        recipe: Recipe,
        batches: Sequence[Mapping[str, Any]],
        seed: int,
        progress: ProgressCallback,
    ) -> Iterator[Searching]:
        """A search; meanwhile experts of a mixture are one Linear a matrix.

        Raises ArchitectureError where a budget cannot be spent on the model.
        """
        if not isinstance(model, PreTrainedModel):
            raise ArchitectureError("only transformers models take a budget; quantize this module (method: rtn)")
        if visited(model):
            raise RecipeError(
                "a search changes blocks all over the model, and the model does not fit the accelerator; "
                "take --device cpu (device='cpu'), or a recipe with steps"
            )
        undo = separate_experts(model)
        try:
            yield cls(model, recipe, batches, seed, progress, cache_folder())
        finally:
            undo()

    @property
    def spec(self) -> SearchSpec:
        assert self.recipe.search is not None
        return self.recipe.search

    @cached_property
    def binding(self) -> Binding:
        found = bind(self.model)
        if self.spec.width or self.spec.depth:
            found.require_roles()
        return found

    @cached_property
    def step(self) -> QuantizeStep:
        """The quantize step that the weights will be stored by."""
        body = {"effort": self.spec.effort, "group_size": self.spec.group_size}
        return QuantizeStep(**expand(body))

    @cached_property
    def method(self) -> QuantizationMethod:
        found = METHODS.build(self.step.method, self.step.options)
        assert not isinstance(found, ModelMethod)
        return found

    @cached_property
    def space(self) -> Space:
        schemes = tuple(Scheme(bits, group_size=self.spec.group_size) for bits in self.spec.bits)
        return Space(schemes, self.spec.width, self.spec.depth, self.spec.embeddings, self.recipe.portable)

    @cached_property
    def quantizable(self) -> frozenset[str]:
        inside = {path for block in self.binding.blocks for path in block.roles}
        return frozenset(inside & select(self.model, self.binding, self.step).paths.keys())

    @cached_property
    def dtype(self) -> torch.dtype | None:
        return None if self.recipe.dtype == "keep" else getattr(torch, self.recipe.dtype)

    @cached_property
    def latency(self) -> LatencyTable:
        stored = self.dtype or self.model.dtype
        return LatencyTable.open(stored, self.model.device, None if self.cache is None else self.cache / "latency")

    @cached_property
    def sensitivity(self) -> Sensitivity:
        """What everything is worth; measured, or as it was kept."""
        return sensitivity_of(
            self.model,
            self.binding,
            self.space,
            self.method if self.space.schemes else None,
            self.quantizable,
            self.batches,
            None if self.cache is None else self.cache / "sensitivity",
            seed=self.seed,
            scale_dtype=self.dtype or self.model.dtype,
            progress=self.progress,
        )

    def problem(self, sensitivity: Sensitivity, timed: bool) -> Problem:
        """All decisions. `timed`: with the seconds that options take on this device."""
        step = self.step
        base = Plan(
            self.binding.model_type,
            method=step.method,
            options=dict(step.options),
            transforms=step.transforms,
            tune=dict(step.tune),
            starved_experts=self.spec.starved_experts,
            effort=step.effort,
            refit=True,
            repair=True,
            dtype="keep" if self.dtype is None else str(self.dtype).removeprefix("torch."),
            calibration=asdict(self.recipe.calibration),
            depths=self.binding.depths,
        )
        made = make_problem(
            self.model,
            self.binding,
            self.space,
            sensitivity,
            self.quantizable,
            base,
            dtype=self.dtype,
            latency=self.latency if timed else None,
        )
        if timed:
            self.latency.save()
        return made

    def check(self, budget: Budget) -> None:
        """Whether there is anything to search for. Needs no data; measures nothing but latencies.

        Raises:
            RecipeError: the budget is out of reach, the dense model keeps it, or nothing can be rehearsed that should
                be.
            ArchitectureError: it limits what the model does not do.
        """
        reason = why_not(self.model) if self.spec.rehearse else None
        if reason is not None:
            raise RecipeError(f"search.rehearse: {reason}; leave it out, and the search goes by what it knows of runs")
        if budget.timed:
            check_timed(self.model, [name for name in LATENCIES if getattr(budget, name) is not None])
        if budget.memory is not None:
            check_cached(self.model, self.sizes(budget.timed).dense)
        if not self.casts and self.needs_nothing(budget):
            raise RecipeError(f"the dense model keeps the budget ({budget}) as it is; ask for less")
        self.programme(budget, self.sizes(budget.timed))

    @property
    def casts(self) -> bool:
        """Whether the recipe changes the model's dtype."""
        return self.dtype not in (None, self.model.dtype)

    def needs_nothing(self, budget: Budget) -> bool:
        """Whether the model keeps a budget with nothing done to it but a cast to the recipe's dtype."""
        problem = self.sizes(budget.timed)
        return self.limits(budget, problem).hold(problem.dense)

    def sizes(self, timed: bool) -> Problem:
        """The problem with what everything takes, where nothing was measured yet that says what it is worth."""
        if timed not in self._sizes:
            blank = blank_sensitivity(self.model, self.binding, self.space, self.quantizable)
            self._sizes[timed] = self.problem(blank, timed)
        return self._sizes[timed]

    def programme(self, budget: Budget, problem: Problem) -> Programme:
        """Raises RecipeError where the budget is out of reach."""
        found = Programme(problem, self.limits(budget, problem))
        check_reachable(found, self.spec, self.recipe.portable)
        return found

    def limits(self, budget: Budget, problem: Problem) -> Limits:
        """The budget in bytes and seconds. Shares are of the model as it was given."""
        text = self.model.config.get_text_config()
        dense = problem.dense
        if self.casts:
            table = self.latency.beside(self.model.dtype) if budget.timed else None
            dense = dense_cost(self.model, self.binding, table)
        return Limits.of(budget, dense, getattr(text, "max_position_embeddings", None))

    def measured(self, problem: Problem, batches: Sequence[Mapping[str, Any]] | None = None) -> MeasuredAssignments:
        """What measures true divergences on the calibration data, or on other batches."""
        return MeasuredAssignments(
            self.model,
            self.binding,
            problem,
            self.weights(problem),
            self.batches if batches is None else batches,
            self.seed,
            self.progress,
        )

    def weights(self, problem: Problem) -> RoundedWeights:
        """What options make of the weights; one for all budgets on the same options."""
        if self._weights is None or self._weights[0] is not problem:
            shelf = Shelf(Room(IN_MEMORY))
            statistics = input_statistics(
                self.model,
                self.binding.stacks,
                {path for block in self.binding.blocks for path in block.roles},
                choose(self.batches, STATISTICS_TOKENS, self.seed),
                shelf,
                self.progress,
                heads=self.space.embeddings and not self.space.portable,
            )
            made = RoundedWeights(self.model, self.binding, problem, self.method, statistics, shelf)
            self._weights = problem, made
        return self._weights[1]

    def choose(self, programme: Programme, *, rehearsed: bool = True) -> Chosen:
        """The best assignment within a programme's limits.

        `rehearsed`: what is found is carried out too. What runs leave of damages is learnt for the first budget, and
        holds for further ones.
        """
        problem, tried = programme.problem, []
        rehearse = self._rehearsal(problem)
        if rehearse is not None and self._factors is None:
            tried = [rehearse(assignment) for assignment in guesses(programme)]
            self._factors = learn(problem, tried, self._usual)
        return choose_assignment(
            programme,
            lambda: self.measured(problem),
            self.spec,
            self.seed,
            self.progress,
            self._factors or self._usual,
            tried,
            rehearse if rehearsed else None,
        )

    @property
    def _usual(self) -> Factors:
        return USUAL if getattr(self.method, "follows_dense", False) else NEUTRAL

    def _rehearsal(self, problem: Problem) -> Rehearsal | None:
        """What carries assignments out; None where that was not asked for."""
        if not self.spec.rehearse:
            return None
        batches, held_out = split(self.batches)
        measure = self.measured(problem, held_out)
        return Rehearsal(
            self.model, problem, self.weights(problem), measure, batches, self.dtype, self.seed, self.progress
        )
