"""Carry out an assignment on a copy of the model, to see what a run makes of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_shrink.architectures.binding import bind
from hf_shrink.checkpoint.loaded_dtypes import loaded_dtypes
from hf_shrink.evaluation.dense_copies import dense_copies
from hf_shrink.evaluation.machine import available_bytes
from hf_shrink.evaluation.size import unique_bytes
from hf_shrink.pipeline.applying import apply_plan
from hf_shrink.pipeline.recipes import plan_method
from hf_shrink.progress import ProgressCallback, quiet
from hf_shrink.pruning.samples import choose
from hf_shrink.recall import recall
from hf_shrink.report import ShrinkReport
from hf_shrink.residence import cast, residence_of
from hf_shrink.runtime.experts import separate_modules
from hf_shrink.search.measured import MeasuredAssignments
from hf_shrink.search.options import Assignment, Problem
from hf_shrink.search.rehearsed import Rehearsed
from hf_shrink.search.replacements import RoundedWeights

TOKENS = 16_384  # that a rehearsal calibrates on
MEASURED = 8192  # that it is measured on
HELD_OUT = 4  # one batch in so many is measured on, and not calibrated on
SPARE = 1.5  # times the model's bytes that have to be free for its copy


def why_not(model: PreTrainedModel) -> str | None:
    """Why nothing can be rehearsed on the model; None where it can."""
    if residence_of(model) is not None:
        return "the model's weights stay in files, and a rehearsal takes a copy in memory (load it, and call `shrink`)"
    if separate_modules(model):
        return "mixtures of experts are not rehearsed"
    device = next(model.parameters()).device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
    if free is not None and free < SPARE * unique_bytes(model):
        return "there is no memory for a copy of the model"
    return None


@dataclass
class Rehearsal:
    """Rehearses assignments of one problem.

    Attributes:
        weights: what options make of weights one by one.
        measure: true divergences of those, on data that `batches` does not have.
        dtype: that a run stores dense weights in; None: as they are.
    """

    model: PreTrainedModel
    problem: Problem
    weights: RoundedWeights
    measure: MeasuredAssignments
    batches: Sequence[Mapping[str, Any]]
    dtype: torch.dtype | None
    seed: int
    progress: ProgressCallback = quiet

    def __call__(self, assignment: Assignment) -> Rehearsed:
        """Carry it out, without tuning; the model itself is left as it is."""
        names = [(group.name, *(option.name for option in group.options)) for group in self.problem.groups]
        key = (names, assignment, len(self.batches))
        return Rehearsed(assignment, *recall().value("rehearsal", key, lambda: self._divergences(assignment)))

    def _divergences(self, assignment: Assignment) -> list[float]:
        problem, outer = self.problem, [place for place, g in enumerate(self.problem.groups) if g.block is None]
        inner = tuple(0 if place in outer else option for place, option in enumerate(assignment))
        alone_whole, alone_blocks = self.measure.divergences(assignment, [assignment, inner], MEASURED)
        model = copy.deepcopy(self.model)
        if self.dtype is not None:
            cast(model, self.dtype, loaded_dtypes(model, self.dtype))
        plan = replace(problem.plan(inner), tune={})
        chosen = choose(self.batches, TOKENS, self.seed)
        apply_plan(model, bind(model), plan, plan_method(plan), chosen, ShrinkReport(), self.progress, self.seed)
        with dense_copies([model]):
            blocks = self.measure.divergence_of(model, MEASURED)
            for place in outer:
                for path, weight in self.weights.weights(place, assignment[place]).items() if assignment[place] else ():
                    parameter = model.get_parameter(path)
                    parameter.data = weight.to(parameter.device, parameter.dtype)
            whole = self.measure.divergence_of(model, MEASURED)
        return [blocks, whole, alone_blocks, alone_whole]


def split(batches: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Batches to calibrate a rehearsal on, and others to measure it on; of a single one, it is both."""
    held = list(batches[::HELD_OUT])
    rest = [batch for place, batch in enumerate(batches) if place % HELD_OUT]
    return rest or held, held
