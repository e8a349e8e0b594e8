"""Movement: what training moves towards zero goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_shrink.training.pruning.scoring import SCORES


@SCORES.register("movement")
@dataclass(frozen=True)
class Movement:
    """The sum of -dL/dm over all steps (Sanh et al., arXiv 2005.07683; for whole units Lagunas et al., 2109.04838).

    dL/dm is the sum of w * dL/dw over the weights that read the unit, so the score is high where gradient descent
    makes these weights larger. The gradient is taken as if nothing were masked (straight-through), so that what went
    may come back.
    """

    degree: ClassVar[int] = 1
    returns: ClassVar[bool] = True

    def of(self, gradients: Tensor) -> Tensor:
        return -gradients.sum(0)

    def updated(self, score: Tensor, found: Tensor) -> Tensor:
        return score + found

    def costs(self, score: Tensor) -> Tensor:
        """Above the least of the part: only the order within it means something."""
        return score - score.min()
