"""What compressing a block did to its output."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Passed(NamedTuple):
    """A block's output for the first batch, before and after it was compressed."""

    before: Tensor
    after: Tensor

    def relative_error(self, inputs: Tensor) -> float:
        """||after - before||² / ||before - input||²: error of what the block adds to the residual stream."""
        size = added(self.before, inputs).float().square().sum()
        return float((self.after - self.before).float().square().sum() / size.clamp_min(1e-30))


def added(output: Tensor, inputs: Tensor) -> Tensor:
    """What a block adds to its input, of the shape of `output`.

    Where shapes differ (a stage that merges patches) there is no residual stream, and all of the output is the block's.
    """
    return output - inputs.to(output.device) if output.shape == inputs.shape else output
