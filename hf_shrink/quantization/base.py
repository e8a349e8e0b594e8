"""What every quantization method takes and gives. A method never sees a module or its name."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from hf_shrink.ops.quantized import QuantizedWeight
from hf_shrink.plan import Scheme
from hf_shrink.registry import Registry

if TYPE_CHECKING:
    from hf_shrink.calibration.statistics import InputStatistics


class QuantizationMethod(Protocol):
    """A frozen dataclass whose fields are the options a recipe may set."""

    needs_statistics: ClassVar[bool]

    def solve(
        self, weight: Tensor, scheme: Scheme, statistics: InputStatistics | None, *, scale_dtype: torch.dtype
    ) -> QuantizedWeight:
        """Choose a grid and integers for `weight`.

        Args:
            weight: (out_features, in_features) float32. Rows are solved independently unless the strategy is
                "tensor", so Linears that share their input can be stacked.
            scheme: a group size that does not divide in_features is resolved by `Scheme.for_width`.
            statistics: of the Linear's inputs; required where `needs_statistics`.
            scale_dtype: dtype of the stored scales.

        Raises:
            CalibrationError: NaN or Inf in the weight or the statistics, or statistics of no tokens.
        """
        ...


__all__ = ["METHODS", "QuantizationMethod", "QuantizedWeight"]

METHODS: Registry[QuantizationMethod] = Registry("quantization method", "hf_shrink.quantization")
