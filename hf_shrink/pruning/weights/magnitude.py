"""Magnitude: small weights go (Han et al., arXiv 1506.02626)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from hf_shrink.pruning.base import WEIGHTS, WeightView
from hf_shrink.pruning.saliency import SaliencyMethod

if TYPE_CHECKING:
    from hf_shrink.calibration.statistics import InputStatistics


@WEIGHTS.register("magnitude")
@dataclass(frozen=True)
class Magnitude(SaliencyMethod):
    """f(p) = |p|. Needs no data; on language models far behind methods that look at activations.

    Attributes:
        granularity: "tensor", "row" or "global"; see `SaliencyMethod`.
    """

    granularity: str = "tensor"

    def __post_init__(self) -> None:
        self._check_granularity()

    def saliency(self, view: WeightView, statistics: InputStatistics | None) -> Tensor:
        """See `SaliencyMethod.saliency`."""
        return view.rows.abs()
