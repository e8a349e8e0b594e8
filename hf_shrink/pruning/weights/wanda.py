"""Wanda: a weight matters as much as it is large and its input is loud (Sun et al., arXiv 2306.11695)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from hf_shrink.errors import CalibrationError
from hf_shrink.ops.linalg import check_finite
from hf_shrink.pruning.base import WEIGHTS, WeightView
from hf_shrink.pruning.saliency import SaliencyMethod

if TYPE_CHECKING:
    from hf_shrink.calibration.statistics import InputStatistics


@WEIGHTS.register("wanda")
@dataclass(frozen=True)
class Wanda(SaliencyMethod):
    """f(W_ij) = |W_ij| ||x_j||, compared within a row, with the root mean square of the input for its norm.

    The article leaves what is kept as it is: that is `refit: false`. On SmolLM2-135M at half of the weights the refit
    takes the excess loss from 0.594 to 0.266.

    Attributes:
        granularity: "row" or "tensor". Inputs of different matrices are not comparable, so there is no "global".
    """

    granularity: str = "row"
    needs_statistics: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._check_granularity(("row", "tensor"))

    def saliency(self, view: WeightView, statistics: InputStatistics | None) -> Tensor:
        """See `SaliencyMethod.saliency`."""
        if statistics is None or statistics.tokens == 0:
            raise CalibrationError("wanda needs statistics of the inputs; pass calibration data, or use magnitude")
        check_finite(statistics.hessian)
        rms = (statistics.hessian.diagonal() / statistics.tokens).sqrt()
        return view.rows.abs() * rms.to(view.rows.device)
