"""A model as depth methods see it: numbered items, measured with some of them left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from hf_shrink.architectures.absent import without_parts
from hf_shrink.architectures.bound import BoundStack
from hf_shrink.calibration.capture import first_output, model_inputs, split_hidden
from hf_shrink.calibration.padding import token_mask
from hf_shrink.calibration.predictions import divergence
from hf_shrink.errors import CalibrationError
from hf_shrink.progress import ProgressCallback
from hf_shrink.pruning.base import Look
from hf_shrink.pruning.goal import Goal
from hf_shrink.pruning.items import Items, Left
from hf_shrink.pruning.predicting import Predictor, Reference
from hf_shrink.pruning.replay import recording, replaying
from hf_shrink.pruning.samples import choose
from hf_shrink.recall import recall
from hf_shrink.sharding import Share, share
from hf_shrink.surgery.depth import without_blocks

KEPT_BYTES = 800 * 2**20  # of the dense model's log-probabilities

Key = tuple[str, int]  # a block: the name of its stack, its index


class MeasuredModel:
    """The DepthProblem of a real model.

    Args:
        items: what can go.
        goal: when enough is gone; None: never.
    """

    def __init__(
        self,
        model: nn.Module,
        items: Items,
        batches: Sequence[Mapping[str, Any]],
        seed: int,
        progress: ProgressCallback,
        goal: Goal | None = None,
    ) -> None:
        self._model = model
        self._items = items
        self._batches = batches
        self._seed = seed
        self._progress = progress
        self._goal = goal
        self.labels = tuple(item.label for item in items.all)
        self.sizes = goal.sizes if goal is not None else tuple(1 for _ in items.all)
        self.stacks = items.stacks
        stacks = {item.stack.name: item.stack for item in items.all}
        self._blocks = {(s.name, block.index): block.module for s in stacks.values() for block in s.blocks}
        self._stacks = tuple(stacks.values())
        self._chosen: dict[int | None, tuple[Share, list[dict[str, Any]]]] = {}
        self._dense: dict[Look, tuple[Predictor, list[Reference]]] = {}

    def candidates(self, removed: Sequence[int]) -> tuple[int, ...]:
        if self._goal is not None:
            return self._goal.candidates(removed)
        return tuple(n for n in range(len(self.labels)) if n not in removed and self.allowed([*removed, n]))

    def allowed(self, removed: Sequence[int]) -> bool:
        return self._items.allowed(removed)

    def influences(self, removed: Sequence[int], tokens: int | None = None) -> Mapping[int, float]:
        key = (self.labels, tuple(removed), tokens)
        return dict(recall().value("influences", key, lambda: self._influences(removed, tokens)))

    def _influences(self, removed: Sequence[int], tokens: int | None) -> list[tuple[int, float]]:
        sums: dict[int, float] = {}
        counts: dict[int, int] = {}
        shared, chosen = self._samples(tokens)
        runner = Predictor(self._model, fast=False)
        seen: list[list[tuple[int, float, int]]] = []  # by sample: a number, and the sum and count of its tokens
        for done, inputs in enumerate(chosen):
            self._progress("measuring block influence", done, len(chosen))
            seen.append([])

            def add(number: int, states: tuple[Tensor, Tensor], inputs: Mapping[str, Any] = inputs) -> None:
                before, after = (state.float() for state in states)
                turned = 1 - F.cosine_similarity(before, after.to(before.device), dim=-1)
                turned = _real(turned, inputs, self._items.all[number].stack, self._model)
                seen[-1].append((number, float(turned.double().sum()), turned.numel()))

            with self._without(self._items.left(removed)), self._watching(removed, add):
                runner.run(inputs)
        for number, turned, tokens_there in (entry for sample in shared.gather(seen) for entry in sample):
            sums[number] = sums.get(number, 0.0) + turned
            counts[number] = counts.get(number, 0) + tokens_there
        self._progress("measuring block influence", len(chosen), len(chosen))
        found = {number: sums[number] / counts[number] for number in sorted(sums)}
        silent = [label for n, label in enumerate(self.labels) if n not in found and n not in removed]
        if silent:
            raise CalibrationError(f"{silent[0]} never runs on this calibration data; give data that reaches it")
        if not all(abs(value) < float("inf") for value in found.values()):
            raise CalibrationError("NaN or Inf in the hidden states; check the weights and the calibration data")
        return list(found.items())

    def angles(self, spans: Sequence[Sequence[int]], tokens: int) -> list[float]:
        key = (self.labels, tuple(map(tuple, spans)), tokens)
        return recall().value("angles", key, lambda: self._angles(spans, tokens))

    def _angles(self, spans: Sequence[Sequence[int]], tokens: int) -> list[float]:
        sums, count = [0.0] * len(spans), [0] * len(spans)
        runner = Predictor(self._model, fast=True)
        shared, chosen = self._samples(tokens)
        seen: list[list[tuple[float, int]]] = []  # by sample and span, the sum and count of its tokens
        for done, inputs in enumerate(chosen):
            self._progress("measuring angles", done, len(chosen))
            states: dict[int, tuple[Tensor, Tensor]] = {}
            with self._watching([], states.__setitem__):
                runner.run(inputs)
            seen.append([])
            for span in spans:
                if span[0] not in states or span[-1] not in states:
                    raise CalibrationError(f"{self.labels[span[0]]} never runs on this calibration data")
                before, after = states[span[0]][0], states[span[-1]][1]
                cosine = F.cosine_similarity(before.float(), after.float().to(before.device), dim=-1)
                angle = cosine.clamp(-1, 1).arccos() / math.pi
                angle = _real(angle, inputs, self._items.all[span[0]].stack, self._model)
                seen[-1].append((float(angle.double().sum()), angle.numel()))
        for sample in shared.gather(seen):
            for place, (angles, tokens_there) in enumerate(sample):
                sums[place] += angles
                count[place] += tokens_there
        self._progress("measuring angles", len(chosen), len(chosen))
        if not all(total < float("inf") for total in sums):
            raise CalibrationError("NaN or Inf in the hidden states; check the weights and the calibration data")
        return [total / n for total, n in zip(sums, count, strict=True)]

    def divergences(self, base: Sequence[int], trials: Sequence[Sequence[int]], look: Look) -> list[float]:
        key = (self.labels, tuple(base), tuple(map(tuple, trials)), look)
        return recall().value("divergences", key, lambda: self._divergences(base, trials, look))

    def _divergences(self, base: Sequence[int], trials: Sequence[Sequence[int]], look: Look) -> list[float]:
        predictor, references = self._references(look)
        shared, samples = self._samples(look.tokens)
        found: list[list[float]] = []  # by sample and trial
        left, others = self._items.left(base), [self._items.left(trial) for trial in trials]
        work = len(references) * len(trials)
        for place, (inputs, reference) in enumerate(zip(samples, references, strict=True)):
            found.append([])
            running = {
                (stack.name, i): self._blocks[stack.name, i] for stack in self._stacks for i in left.kept[stack.name]
            }
            with self._without(left), recording(running) as outputs:
                predictor.run(inputs)
            order = list(outputs)
            for number, other in enumerate(others):
                self._progress("trying what to remove", place * len(trials) + number, work)
                # What runs before the first change is as it was, so only what comes behind is computed again.
                same = order[: self._first_change(order, left, other)]
                with self._without(other), replaying({key: running[key] for key in same}, outputs):
                    found[-1].append(divergence(reference.kept, predictor.predict(inputs, reference)))
        self._progress("trying what to remove", work, work)
        rows = sum(shared.gather(len(reference.kept.values) for reference in references))
        return [sum(column) / rows for column in zip(*shared.gather(found), strict=True)]

    def _first_change(self, order: Sequence[Key], base: Left, other: Left) -> int:
        """How many of the blocks that run in `base` run in the same way, on the same inputs, in `other`."""
        places = {key: place for place, key in enumerate(order)}
        first = len(order)
        for stack in self._stacks:
            inside = [key for key in order if key[0] == stack.name]
            for block in stack.blocks:
                key = (stack.name, block.index)
                here, there = block.index in base.kept[stack.name], block.index in other.kept[stack.name]
                if here == there and base.parts.get(key, ()) == other.parts.get(key, ()):
                    continue
                if not inside or (here and key not in places):
                    raise CalibrationError(f"{block.path} never runs on this calibration data; give data that does")
                behind = [place for place in map(places.__getitem__, inside) if order[place][1] >= block.index]
                first = min(first, behind[0] if behind else places[inside[-1]] + 1)
        return first

    def _references(self, look: Look) -> tuple[Predictor, list[Reference]]:
        if look not in self._dense:
            predictor = Predictor(self._model, look.fast)
            shared, chosen = self._samples(look.tokens)
            self._dense[look] = predictor, []
            for inputs in chosen:
                most = max(1, look.predictions // shared.count)
                self._dense[look][1].append(predictor.reference(inputs, most, KEPT_BYTES // shared.count))
        return self._dense[look]

    def _samples(self, tokens: int | None) -> tuple[Share, list[dict[str, Any]]]:
        """This process's samples, and which they are of all."""
        if tokens not in self._chosen:
            if not self._batches:
                raise CalibrationError("there is no calibration data to measure blocks on")
            chosen = choose(self._batches, tokens, self._seed)
            shared = share(len(chosen))
            self._chosen[tokens] = shared, [model_inputs(self._model, batch) for batch in shared.of(chosen)]
        return self._chosen[tokens]

    @contextmanager
    def _without(self, left: Left) -> Iterator[None]:
        with ExitStack() as stack:
            for bound in self._stacks:
                gone = [block.index for block in bound.blocks if block.index not in left.kept[bound.name]]
                if gone:
                    stack.enter_context(without_blocks(self._model, bound, gone))
                takings = [
                    (self._blocks[name, index], bound.spec, parts)
                    for (name, index), parts in left.parts.items()
                    if name == bound.name and bound.spec is not None
                ]
                stack.enter_context(without_parts(takings))
            yield

    @contextmanager
    def _watching(self, removed: Sequence[int], see: Callable[[int, tuple[Tensor, Tensor]], None]) -> Iterator[None]:
        """Show the hidden states in front of and behind every block that runs, with its number."""
        with ExitStack() as stack:
            for number, item in enumerate(self._items.all):
                if number not in removed:

                    def hook(_: nn.Module, args: Any, kwargs: Any, output: Any, number: int = number) -> None:
                        see(number, (split_hidden(args, kwargs)[0], first_output(output)))

                    stack.callback(item.block.module.register_forward_hook(hook, with_kwargs=True).remove)
            yield


def _real(values: Tensor, inputs: Mapping[str, Any], stack: BoundStack, model: nn.Module) -> Tensor:
    """The values (batch, sequence) of real tokens; an encoder in front of a decoder has a mask of its own."""
    encoder = stack.spec is not None and not stack.spec.cached
    mask = token_mask({"attention_mask": inputs.get("attention_mask")} if encoder else inputs, values.shape, model)
    return values if mask is None else values[mask.to(values.device)]
