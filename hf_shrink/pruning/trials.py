"""What an error in one place does to the model's predictions, measured by running what comes after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from hf_shrink.architectures.binding import Binding
from hf_shrink.architectures.linears import bias_of, matrix
from hf_shrink.calibration.capture import model_inputs
from hf_shrink.calibration.predictions import divergence
from hf_shrink.errors import CalibrationError
from hf_shrink.pruning.predicting import Predictor
from hf_shrink.pruning.replay import recording, replaying
from hf_shrink.pruning.samples import choose
from hf_shrink.residence import at_work, rest
from hf_shrink.sharding import share

TOKENS = 1024
PREDICTIONS = 512  # of them are compared
KEPT_BYTES = 400 * 2**20  # of the dense model's log-probabilities
LEAST = 1e-7  # nats; smaller divergences are rounding errors


class Trials:
    """KL(dense || changed) of the predictions when a matrix of the dense model, or several, are others.

    What every block puts out is kept, so that a measurement runs only the blocks from the changed one on.

    Args:
        batches: model inputs; about TOKENS tokens of them run, and PREDICTIONS of their predictions are compared.
    """

    def __init__(self, model: nn.Module, binding: Binding, batches: Sequence[Mapping[str, Any]], seed: int) -> None:
        if not batches:
            raise CalibrationError("there is no calibration data to try removals on")
        owners = [(stack.name, block) for stack in binding.stacks for block in stack.blocks]
        self._blocks = {number: block.module for number, (_, block) in enumerate(owners)}
        self._numbers = {(name, block.index): number for number, (name, block) in enumerate(owners)}
        chosen = choose(batches, TOKENS, seed)
        self._share = share(len(chosen))
        self._samples = [model_inputs(model, batch) for batch in self._share.of(chosen)]
        self._predictor = Predictor(model, fast=False)
        count = len(chosen)
        most, largest = -(-PREDICTIONS // count), KEPT_BYTES // count
        self._dense = [self._predictor.reference(inputs, most, largest) for inputs in self._samples]
        self._rows = sum(self._share.gather(len(reference.kept.values) for reference in self._dense))
        self._outputs: list[dict[int, Any]] = []
        for inputs in self._samples:
            with recording(self._blocks) as outputs:
                self._predictor.run(inputs)
            self._outputs.append(outputs)

    def divergence(self, block: tuple[str, int], module: nn.Module, weight: Tensor, bias: Tensor | None) -> float:
        """Mean over predictions, in nats (1 - cos where the model predicts nothing), at least LEAST.

        Args:
            block: stack name and index of the block that `module` is in.
            weight, bias: (out, in) and (out,) in place of the module's, for as long as this takes.
        """
        changes = [(matrix(module), weight)]
        if bias is not None and (own := bias_of(module)) is not None:
            changes.append((own, bias))
        return self.divergence_of(changes, block)

    def divergence_of(self, changes: Sequence[tuple[Tensor, Tensor]], block: tuple[str, int] | None = None) -> float:
        """As `divergence`, of any changes: pairs of a tensor of the model and what its values are meanwhile.

        Args:
            block: in front of which nothing changes; None: everything runs again.
        """
        number = None if block is None else self._numbers[block]
        with ExitStack() as stack:
            if number is not None:
                stack.enter_context(at_work(self._blocks[number]))
            stack.enter_context(_changed(changes))
            own = [self._divergence(number, sample) for sample in range(len(self._samples))]
        for changed in self._blocks.values() if number is None else (self._blocks[number],):
            rest(changed)
        return max(sum(self._share.gather(own)) / self._rows, LEAST)

    def _divergence(self, number: int | None, sample: int) -> float:
        outputs, inputs, reference = self._outputs[sample], self._samples[sample], self._dense[sample]
        order = list(outputs)
        if number is not None and number not in outputs:
            raise CalibrationError("a block never runs on this calibration data; give data that reaches every block")
        before = [] if number is None else order[: order.index(number)]
        with replaying({n: self._blocks[n] for n in before}, outputs):
            return divergence(reference.kept, self._predictor.predict(inputs, reference))


@contextmanager
def _changed(changes: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    before = [place.clone() for place, _ in changes]
    try:
        for place, value in changes:
            place.copy_(value)
        yield
    finally:
        for (place, _), value in zip(changes, before, strict=True):
            place.copy_(value)
