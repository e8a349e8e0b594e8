"""A model as depth methods see it: numbered blocks, measured with some of them left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_shrink.architectures.binding import Binding
from hf_shrink.architectures.bound import BoundStack
from hf_shrink.calibration.capture import first_output, model_inputs, split_hidden
from hf_shrink.calibration.predictions import Predictions, divergence, keep, predictions_of, token_mask
from hf_shrink.errors import CalibrationError
from hf_shrink.progress import ProgressCallback
from hf_shrink.pruning.replay import recording, replaying
from hf_shrink.pruning.samples import choose
from hf_shrink.surgery.depth import without_blocks

KEPT_BYTES = 800 * 2**20  # of the dense model's log-probabilities


class MeasuredModel:
    """The DepthProblem of a real model. Blocks are numbered over all stacks, in the binding's order.

    Attributes:
        labels: the blocks' paths.
        sizes: their parameters.
        notes: which blocks never go, and why.
    """

    def __init__(
        self,
        model: nn.Module,
        binding: Binding,
        batches: Sequence[Mapping[str, Any]],
        seed: int,
        progress: ProgressCallback,
    ) -> None:
        self._model = model
        self._batches = batches
        self._seed = seed
        self._progress = progress
        self._stacks = binding.stacks
        self._owners = [(stack, block) for stack in binding.stacks for block in stack.blocks]
        self.labels = tuple(block.path for _, block in self._owners)
        self.sizes = tuple(block.parameters for _, block in self._owners)
        self.notes = tuple(
            f"no blocks of {stack.name} are removed: {stack.spec.depth_fixed}"
            for stack in self._stacks
            if stack.spec is not None and stack.spec.depth_fixed is not None
        )
        self._chosen: dict[int | None, list[dict[str, Any]]] = {}
        self._dense: dict[int, list[Predictions]] = {}

    def kept(self, removed: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Indices of the blocks left, by stack name."""
        return {
            stack.name: tuple(b.index for n, (s, b) in enumerate(self._owners) if s is stack and n not in removed)
            for stack in self._stacks
        }

    def candidates(self, removed: Sequence[int]) -> tuple[int, ...]:
        left = self.kept(removed)
        return tuple(
            number
            for number, (stack, block) in enumerate(self._owners)
            if number not in removed and len(left[stack.name]) > 1 and not _stays(stack, block.index)
        )

    def influences(self, removed: Sequence[int], tokens: int | None = None) -> Mapping[int, float]:
        sums: dict[int, float] = {}
        counts: dict[int, int] = {}
        chosen = self._samples(tokens)
        for done, inputs in enumerate(chosen):
            self._progress("measuring block influence", done, len(chosen))
            with self._without(removed), self._watching(removed, inputs, sums, counts):
                self._forward(inputs)
        self._progress("measuring block influence", len(chosen), len(chosen))
        found = {number: sums[number] / counts[number] for number in sorted(sums)}
        silent = [self.labels[number] for number in self.candidates(removed) if number not in found]
        if silent:
            raise CalibrationError(f"{silent[0]} never runs on this calibration data; give data that reaches it")
        if not all(abs(value) < float("inf") for value in found.values()):
            raise CalibrationError("NaN or Inf in the hidden states; check the weights and the calibration data")
        return found

    def divergences(self, removed: Sequence[int], candidates: Sequence[int], tokens: int) -> Mapping[int, float]:
        chosen, dense = self._samples(tokens), self._dense_predictions(tokens)
        sums = dict.fromkeys(candidates, 0.0)
        for place, (inputs, reference) in enumerate(zip(chosen, dense, strict=True)):
            left = {n: block.module for n, (_, block) in enumerate(self._owners) if n not in removed}
            with self._without(removed), recording(left) as outputs:
                self._forward(inputs)
            order = list(outputs)
            for done, number in enumerate(candidates):
                self._progress("trying blocks", place * len(candidates) + done, len(chosen) * len(candidates))
                if number not in outputs:
                    raise CalibrationError(f"{self.labels[number]} never runs on this calibration data")
                # What runs before the block is as it was, so only what comes after it is computed again.
                before = {n: left[n] for n in order[: order.index(number)]}
                with self._without([*removed, number]), replaying(before, outputs):
                    found = self._forward(inputs)
                pruned = predictions_of(found, inputs).thinned(len(reference.values))
                sums[number] += divergence(reference, pruned)
        self._progress("trying blocks", len(chosen) * len(candidates), len(chosen) * len(candidates))
        rows = sum(len(reference.values) for reference in dense)
        return {number: total / rows for number, total in sums.items()}

    def _dense_predictions(self, tokens: int) -> list[Predictions]:
        if tokens not in self._dense:
            chosen = self._samples(tokens)
            self._dense[tokens] = []
            for inputs in chosen:
                found = predictions_of(self._forward(inputs), inputs)
                most = KEPT_BYTES // (4 * found.values.shape[1] * len(chosen))
                self._dense[tokens].append(keep(found.thinned(max(1, most))))
        return self._dense[tokens]

    def _samples(self, tokens: int | None) -> list[dict[str, Any]]:
        if tokens not in self._chosen:
            if not self._batches:
                raise CalibrationError("there is no calibration data to measure blocks on")
            chosen = choose(self._batches, tokens, self._seed)
            self._chosen[tokens] = [model_inputs(self._model, batch) for batch in chosen]
        return self._chosen[tokens]

    def _forward(self, inputs: Mapping[str, Any]) -> Any:
        with torch.no_grad():
            return self._model(**inputs)

    @contextmanager
    def _without(self, removed: Sequence[int]) -> Iterator[None]:
        left = self.kept(removed)
        with ExitStack() as stack:
            for bound in self._stacks:
                gone = [block.index for block in bound.blocks if block.index not in left[bound.name]]
                if gone:
                    stack.enter_context(without_blocks(self._model, bound, gone))
            yield

    @contextmanager
    def _watching(
        self, removed: Sequence[int], inputs: Mapping[str, Any], sums: dict[int, float], counts: dict[int, int]
    ) -> Iterator[None]:
        """Add up 1 - cos(input, output) over the tokens of every block that runs."""

        def watch(number: int, args: Any, kwargs: Any, output: Any) -> None:
            before, after = split_hidden(args, kwargs)[0], first_output(output)
            turned = 1 - F.cosine_similarity(before.float(), after.float().to(before.device), dim=-1)
            turned = _real(turned, inputs, self._owners[number][0])
            sums[number] = sums.get(number, 0.0) + float(turned.double().sum())
            counts[number] = counts.get(number, 0) + turned.numel()

        with ExitStack() as stack:
            for number, (_, block) in enumerate(self._owners):
                if number not in removed:

                    def hook(_: nn.Module, args: Any, kwargs: Any, output: Any, number: int = number) -> None:
                        watch(number, args, kwargs, output)

                    stack.callback(block.module.register_forward_hook(hook, with_kwargs=True).remove)
            yield


def _stays(stack: BoundStack, index: int) -> bool:
    spec = stack.spec
    return spec is None or spec.depth_fixed is not None or (spec.first_is_special and index == 0)


def _real(values: Tensor, inputs: Mapping[str, Any], stack: BoundStack) -> Tensor:
    """The values (batch, sequence) of real tokens; an encoder in front of a decoder has a mask of its own."""
    encoder = stack.spec is not None and not stack.spec.cached
    mask = token_mask({"attention_mask": inputs.get("attention_mask")} if encoder else inputs, values.shape)
    return values if mask is None else values[mask.to(values.device)]
