"""Give a method that learns the block it works on: targets from the dense model, weights opened for training."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_shrink.architectures.linears import matrix
from hf_shrink.calibration.capture import first_output
from hf_shrink.calibration.dense_stream import DenseStream
from hf_shrink.calibration.frozen import frozen
from hf_shrink.calibration.passed import Passed, added
from hf_shrink.calibration.walk import StackWalk
from hf_shrink.ops.precision import fast_precision
from hf_shrink.quantization.base import LearningMethod, Learnt
from hf_shrink.residence import at_work
from hf_shrink.runtime.linear import CompressedLinear
from hf_shrink.runtime.trainable import TrainableLinear
from hf_shrink.sharding import ranks


class _Problem:
    """See `quantization.base.BlockProblem`."""

    def __init__(self, walk: StackWalk, dense: DenseStream, weights: Sequence[TrainableLinear]) -> None:
        self.batches = len(walk.hidden)
        self.weights = weights
        self._walk, self._dense = walk, dense

    def loss(self, batch: int) -> Tensor:
        inputs, mask = self._walk.hidden[batch], self._walk.mask(batch)
        with fast_precision(inputs.device):
            output = first_output(self._walk.run(batch))
        target = self._dense.target(batch)
        lost, own = output.float() - target, added(target, inputs)
        if mask is not None and mask.shape == target.shape[:2]:
            lost, own = lost[mask.to(lost.device)], own[mask.to(own.device)]
        return lost.square().sum() / own.square().sum().clamp_min(1e-30)


@dataclass
class Learning:
    """Learned rounding over a whole model, and what came of it. Of several processes the first one learns."""

    model: nn.Module
    method: LearningMethod
    seed: int
    seconds: list[float] = field(default_factory=list)
    gains: list[Learnt] = field(default_factory=list)

    def block(
        self,
        walk: StackWalk,
        dense: DenseStream,
        paths: Sequence[str],
        pack: Callable[[], object],
        further: bool,
        timed: Callable[[str], AbstractContextManager[None]],
    ) -> Passed:
        """Pack the current block's matrices, improve them together, and go on to the next block (if `further`)."""
        with at_work(walk.block):
            originals = {path: matrix(self.model.get_submodule(path)).detach() for path in paths}
            with timed("calibrate"):
                pack()
            with timed("learn"):
                self._learn(walk, dense, originals)
        before = dense.target(0)
        with timed("calibrate"):
            if further:
                walk.advance()
            return Passed(before, walk.hidden[0] if further else walk.outputs(1)[0])

    def _learn(self, walk: StackWalk, dense: DenseStream, originals: dict[str, Tensor]) -> None:
        """Let the method improve the packed Linears at the paths of `originals`, the weights that were rounded."""
        since = time.perf_counter()
        opened: dict[str, tuple[TrainableLinear, CompressedLinear]] = {}
        try:
            # Around the opening, which makes the only parameters that are trained.
            with frozen(walk.block):
                for path, weight in originals.items():
                    packed = self.model.get_submodule(path)
                    if type(packed) is CompressedLinear:
                        linear = TrainableLinear(packed, rounding=True, dense=weight)
                        opened[path] = linear, packed
                        self.model.set_submodule(path, linear)
                if opened:
                    problem = _Problem(walk, dense, [linear for linear, _ in opened.values()])
                    with torch.enable_grad():
                        self.gains.append(ranks().on_first(lambda: self.method.learn(problem, self.seed)))
            for linear, _ in opened.values():
                ranks().copy_first(*linear.parameters(), *linear.buffers())
        finally:
            for path, (linear, _) in opened.items():
                self.model.set_submodule(path, linear.packed())
        self.seconds.append(time.perf_counter() - since)

    def note(self) -> str:
        """One line for the report."""
        if not self.gains:
            return "learned rounding found nothing to learn"
        before = sum(gain.before for gain in self.gains) / len(self.gains)
        after = sum(gain.after for gain in self.gains) / len(self.gains)
        others = "" if ranks().size == 1 else f"; only one of the {ranks().size} processes can do that"
        return (
            f"learned rounding took the blocks' mean relative output error on held-out batches from {before:.4g} to "
            f"{after:.4g} in {sum(self.seconds):.0f} s{others}"
        )
