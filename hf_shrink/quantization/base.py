"""What every quantization method takes and gives. A method never sees a module or its name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from hf_shrink.ops.grid import Grid, dequantize
from hf_shrink.plan import Scheme
from hf_shrink.registry import Registry

if TYPE_CHECKING:
    from hf_shrink.calibration.statistics import InputStatistics


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight on its grid.

    Attributes:
        values: int8 (out_features, in_features).
        grid: the scales and zero points that the values refer to.
        error: relative squared error of the Linear's outputs, tr(D H D^T) / tr(W H W^T) with D = W - dequantized;
            without statistics H is the identity. Of the whole weight that was solved, also after `rows`.
        notes: what the user should know, for example grown damping. The caller adds the module's name.
    """

    values: Tensor
    grid: Grid
    error: float
    notes: tuple[str, ...] = ()

    def dequantized(self) -> Tensor:
        """The weights in float32, (out_features, in_features)."""
        return dequantize(self.values, self.grid)

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """Rows `start` to `stop`: one Linear of several that were stacked and solved as one."""
        return QuantizedWeight(self.values[start:stop], self.grid.rows(start, stop), self.error, self.notes)


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


METHODS: Registry[QuantizationMethod] = Registry("quantization method", "hf_shrink.quantization")
