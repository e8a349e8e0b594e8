"""The true divergence of assignments, from weights that are compressed already and only put in their places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_shrink.architectures.absent import without_parts
from hf_shrink.architectures.binding import Binding
from hf_shrink.calibration.capture import model_inputs
from hf_shrink.calibration.predictions import divergence
from hf_shrink.errors import CalibrationError
from hf_shrink.progress import ProgressCallback, quiet
from hf_shrink.pruning.predicting import Predictor, Reference
from hf_shrink.pruning.replay import recording, replaying
from hf_shrink.pruning.samples import choose
from hf_shrink.recall import recall
from hf_shrink.search.options import Assignment, Problem
from hf_shrink.sharding import Share, share
from hf_shrink.surgery.depth import without_blocks

ROWS = 4  # of as many tokens one prediction is compared: the output head of small models costs as much as blocks
ALL = 2**62
DENSE_BYTES = 800 * 2**20  # of the dense model's log-probabilities
OUTPUT_BYTES = 2**30  # of what a base's blocks put out

Key = tuple[str, int]  # a block: the name of its stack, its index


class Replacements(Protocol):
    """What every option makes of the weights, but for blocks and parts that go as a whole."""

    def weights(self, group: int, option: int) -> Mapping[str, Tensor]:
        """By path of the parameter, what stands in its place where the option is taken: of the same shape, with zeros
        where something was cut. Parameters that are not named stay dense."""


@dataclass(frozen=True)
class Structure:
    """What an assignment takes out as a whole: blocks, and parts of blocks that are left."""

    dropped: frozenset[Key]
    parts: Mapping[Key, tuple[str, ...]]

    @classmethod
    def of(cls, problem: Problem, assignment: Assignment) -> Structure:
        dropped: set[Key] = set()
        parts: dict[Key, tuple[str, ...]] = {}
        for group, option in zip(problem.groups, problem.taken(assignment), strict=True):
            if group.stack is None or group.block is None:
                continue
            key = (group.stack, group.block)
            if option.change.dropped:
                dropped.add(key)
            elif option.change.block.removed:
                parts[key] = (*parts.get(key, ()), *option.change.block.removed)
        return cls(frozenset(dropped), {key: gone for key, gone in parts.items() if key not in dropped})


class Installed:
    """A model with an assignment's weights in the places of its own, in one context; dense again when that ends."""

    def __init__(self, model: nn.Module, problem: Problem, replacements: Replacements) -> None:
        self._model = model
        self._replacements = replacements
        self._now = [0] * len(problem.groups)  # as in an assignment: all dense
        self._kept: dict[str, tuple[nn.Parameter, Tensor]] = {}  # what was replaced so far, with its dense tensor
        self._replaced: list[set[str]] = [set() for _ in problem.groups]

    def put(self, assignment: Assignment) -> None:
        """Exchange what differs from the assignment that is in place."""
        for group, option in enumerate(assignment):
            if option == self._now[group]:
                continue
            weights = self._replacements.weights(group, option) if option else {}
            for path in self._replaced[group] - set(weights):
                parameter, dense = self._kept[path]
                parameter.data = dense
            for path, weight in weights.items():
                if path not in self._kept:
                    self._kept[path] = self._dense_of(self._model.get_parameter(path))
                parameter, dense = self._kept[path]
                parameter.data = weight.to(dense.device, dense.dtype)
            self._replaced[group] = set(weights)
            self._now[group] = option

    def _dense_of(self, parameter: nn.Parameter) -> tuple[nn.Parameter, Tensor]:
        """A parameter with its dense tensor, which under another path (a tied head) may be replaced already."""
        return next((known for known in self._kept.values() if known[0] is parameter), (parameter, parameter.data))

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *error: object) -> None:
        for parameter, dense in self._kept.values():  # also what a `put` that failed half way has replaced
            parameter.data = dense


class MeasuredAssignments:
    """KL(dense || compressed) of a model's predictions under assignments, see `refine.Measure`.

    The dense model's predictions are kept. Assignments that differ little share the work of the blocks in front of the
    first difference. Products are bfloat16 where that is native.

    Args:
        binding: of the dense model.
        batches: model inputs.
        seed: which of them are used where only some are looked at.
    """

    def __init__(
        self,
        model: nn.Module,
        binding: Binding,
        problem: Problem,
        replacements: Replacements,
        batches: Sequence[Mapping[str, Any]],
        seed: int,
        progress: ProgressCallback = quiet,
    ) -> None:
        if not batches:
            raise CalibrationError("there is no calibration data to measure plans on; give some, or data: self")
        self._model = model
        self._binding = binding
        self._problem = problem
        self._replacements = replacements
        self._batches = batches
        self._seed = seed
        self._progress = progress
        self._blocks = {(stack.name, block.index): block.module for stack in binding.stacks for block in stack.blocks}
        self._looks: dict[int | None, tuple[Predictor, Share, list[dict[str, Any]], list[Reference]]] = {}

    def divergences(self, base: Assignment, trials: Sequence[Assignment], tokens: int | None) -> list[float]:
        """Nats a prediction of every trial, on about `tokens` tokens (None: all); the model is dense before and after.

        Raises:
            CalibrationError: a model gives NaN or Inf.
        """
        names = [(group.name, *(option.name for option in group.options)) for group in self._problem.groups]
        key = (names, base, tuple(trials), tokens, len(self._batches))
        return recall().value("assignments", key, lambda: self._divergences(base, trials, tokens))

    def _divergences(self, base: Assignment, trials: Sequence[Assignment], tokens: int | None) -> list[float]:
        predictor, shared, samples, references = self._look(tokens)
        found: list[list[float]] = []  # by trial and sample
        before = Structure.of(self._problem, base)
        with Installed(self._model, self._problem, self._replacements) as installed:
            outputs: list[dict[Key, Any]] = []
            if len(trials) > 1:
                installed.put(base)
                with self._with(before):
                    outputs = self._recorded(predictor, samples, before)
            for trial in trials:
                found.append([])
                installed.put(trial)
                after = Structure.of(self._problem, trial)
                with self._with(after):
                    for place, (inputs, reference) in enumerate(zip(samples, references, strict=True)):
                        same = self._same(outputs[place], base, trial) if place < len(outputs) else []
                        with replaying({key: self._blocks[key] for key in same}, outputs[place] if same else {}):
                            found[-1].append(divergence(reference.kept, predictor.predict(inputs, reference)))
        rows = sum(shared.gather(len(reference.kept.values) for reference in references))
        by_sample = shared.gather(zip(*found, strict=True))
        return [sum(column) / rows for column in zip(*by_sample, strict=True)]

    def divergence_of(self, model: nn.Module, tokens: int | None) -> float:
        """Nats a prediction of another model, on the same data."""
        _, shared, samples, references = self._look(tokens)
        predictor = Predictor(model, fast=True)
        found = [divergence(r.kept, predictor.predict(x, r)) for x, r in zip(samples, references, strict=True)]
        rows = sum(shared.gather(len(reference.kept.values) for reference in references))
        return sum(shared.gather(found)) / rows

    @contextmanager
    def installed(self, assignment: Assignment) -> Iterator[None]:
        """The model as an assignment leaves it, to be measured by others; dense again afterwards."""
        with Installed(self._model, self._problem, self._replacements) as installed:
            installed.put(assignment)
            with self._with(Structure.of(self._problem, assignment)):
                yield

    def _recorded(
        self, predictor: Predictor, samples: Sequence[Mapping[str, Any]], structure: Structure
    ) -> list[dict[Key, Any]]:
        """What the blocks put out for each sample, as far as there is room for it."""
        running = {key: module for key, module in self._blocks.items() if key not in structure.dropped}
        found: list[dict[Key, Any]] = []
        for inputs in samples:
            with recording(running) as outputs:
                predictor.run(inputs)
            found.append(outputs)
            if len(found) * _bytes_of(outputs) > OUTPUT_BYTES:
                break
        return found

    def _same(self, outputs: Mapping[Key, Any], base: Assignment, trial: Assignment) -> list[Key]:
        """The blocks that ran and put out the same in both: those in front of the first difference."""
        order = list(outputs)
        first = len(order)
        for group, here, there in zip(self._problem.groups, base, trial, strict=True):
            if here == there:
                continue
            if group.stack is None or group.block is None:
                return []  # what lies outside the blocks may come before all of them
            inside = [place for place, (stack, _) in enumerate(order) if stack == group.stack]
            behind = [place for place in inside if order[place][1] >= group.block]
            first = min(first, behind[0] if behind else inside[-1] + 1 if inside else 0)
        return order[:first]

    @contextmanager
    def _with(self, structure: Structure) -> Iterator[None]:
        """The model without the blocks and parts that an assignment takes out."""
        with ExitStack() as stack:
            for bound in self._binding.stacks:
                gone = [block.index for block in bound.blocks if (bound.name, block.index) in structure.dropped]
                if gone:
                    stack.enter_context(without_blocks(self._model, bound, gone))
                takings = [
                    (self._blocks[key], bound.spec, parts)
                    for key, parts in structure.parts.items()
                    if key[0] == bound.name and bound.spec is not None
                ]
                stack.enter_context(without_parts(takings))
            yield

    def _look(self, tokens: int | None) -> tuple[Predictor, Share, list[dict[str, Any]], list[Reference]]:
        """Inputs of about so many tokens, those of this process, and what the dense model predicts for them."""
        if tokens not in self._looks:
            predictor = Predictor(self._model, fast=True)
            chosen = choose(self._batches, tokens, self._seed)
            shared, count = share(len(chosen)), len(chosen)
            samples = [model_inputs(self._model, batch) for batch in shared.of(chosen)]
            most, largest = None if tokens is None else max(1, tokens // ROWS // count), DENSE_BYTES // count
            references = []
            for done, inputs in enumerate(samples):
                self._progress("reading the dense model's predictions", done, len(samples))
                references.append(predictor.reference(inputs, most or ALL, largest))
            self._progress("reading the dense model's predictions", len(samples), len(samples))
            self._looks[tokens] = predictor, shared, samples, references
        return self._looks[tokens]


def _bytes_of(outputs: Mapping[Key, Any]) -> int:
    found = [output[0] if isinstance(output, tuple) else output for output in outputs.values()]
    return sum(tensor.nbytes for tensor in found if isinstance(tensor, torch.Tensor))
