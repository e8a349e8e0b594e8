"""Fisher: by how much the loss would change with a unit, to second order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_shrink.pruning.base import WIDTH, UnitView
from hf_shrink.pruning.gradient_scores import GradientScore, needed


@WIDTH.register("fisher")
@dataclass(frozen=True)
class Fisher(GradientScore):
    """Mean over samples of (dL/dm)², m a mask on the unit: the diagonal of the masks' Fisher information (Kwon et al.,
    arXiv 2204.09656).

    Near a minimum of the loss half of it is what one unit's removal costs, which adds up over units whose gradients are
    uncorrelated.
    """

    needs_statistics: ClassVar[bool] = False

    def score(self, view: UnitView) -> Tensor:
        return needed(view, "fisher").square().mean(0)
