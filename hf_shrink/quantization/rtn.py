"""RTN: round every weight to the nearest value of its grid. Needs no data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from hf_shrink.ops.grid import dequantize, min_max_grid, quantize, search_grid
from hf_shrink.ops.linalg import check_finite, relative_error
from hf_shrink.plan import Scheme
from hf_shrink.quantization.base import METHODS, QuantizedWeight

if TYPE_CHECKING:
    from hf_shrink.calibration.statistics import InputStatistics


@METHODS.register("rtn")
@dataclass(frozen=True)
class RTN:
    """Round to nearest.

    Attributes:
        search: choose each scale by least squared error (weighted by the inputs' second moments where there are
            statistics) instead of by the range of the weights.
    """

    search: bool = True
    needs_statistics: ClassVar[bool] = False

    def solve(
        self, weight: Tensor, scheme: Scheme, statistics: InputStatistics | None, *, scale_dtype: torch.dtype
    ) -> QuantizedWeight:
        """See `QuantizationMethod.solve`."""
        weight = weight.detach()
        moment = None if statistics is None or statistics.tokens == 0 else statistics.mean
        if moment is not None:
            check_finite(moment)
        if self.search:
            grid = search_grid(weight, scheme, None if moment is None else moment.diagonal(), scale_dtype)
        else:
            grid = min_max_grid(weight, scheme, scale_dtype)
        values = quantize(weight, grid)
        return QuantizedWeight(values, grid, relative_error(weight, dequantize(values, grid), moment))
