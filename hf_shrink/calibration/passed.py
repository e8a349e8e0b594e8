"""What compressing a block did to its output."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Passed(NamedTuple):
    """A block's output for the first batch, before and after it was compressed."""

    before: Tensor
    after: Tensor

    def relative_error(self, inputs: Tensor) -> float:
        """||after - before||² / ||before - input||²: error of what the block adds to the residual stream.

        A block whose output has another shape than its input (a stage that merges patches) adds to none: all of its
        output is its own.
        """
        adds = self.before.shape == inputs.shape
        size = (self.before - inputs.to(self.before.device) if adds else self.before).float().square().sum()
        return float((self.after - self.before).float().square().sum() / size.clamp_min(1e-30))
