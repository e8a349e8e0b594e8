"""Methods that give every weight an importance and zero the least important ones: all of them choose alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from hf_shrink.ops.masks import pruned
from hf_shrink.pruning.base import Masked, WeightView

if TYPE_CHECKING:
    from hf_shrink.calibration.statistics import InputStatistics

GRANULARITIES = ("tensor", "row", "global")


class SaliencyMethod(ABC):
    """A `WeightsMethod` whose choice is P \\ {p : f(p) <= tau}, or the least f(p) up to a sparsity, or N of every M.

    Attributes:
        granularity: within what a sparsity is kept: every matrix ("tensor"), every row of it ("row"), or all matrices
            together ("global"). Thresholds and patterns mean the same under all of them.
    """

    needs_statistics: ClassVar[bool] = False
    granularity: str

    @abstractmethod
    def saliency(self, view: WeightView, statistics: InputStatistics | None) -> Tensor:
        """f: the importance of every weight, (out, in), without NaN."""

    def prune(self, views: Sequence[WeightView], statistics: InputStatistics | None) -> list[Masked]:
        """See `WeightsMethod.prune`: what is kept stays as it is."""
        found = []
        for view in views:
            gone = pruned(self.saliency(view, statistics), view.amount, self.granularity == "row")
            found.append(Masked(view.rows.masked_fill(gone, 0.0), ~gone))
        return found

    def _check_granularity(self, allowed: Sequence[str] = GRANULARITIES) -> None:
        if self.granularity not in allowed:
            raise ValueError(f"granularity must be one of {', '.join(allowed)}, not {self.granularity!r}")
