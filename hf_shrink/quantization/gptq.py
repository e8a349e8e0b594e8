"""GPTQ (Frantar et al., arXiv 2210.17323): round a column, let the columns not yet rounded make up for its error.

Act order with static groups: columns are rounded in order of falling second moment, onto grids that were fixed before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from hf_shrink.errors import CalibrationError
from hf_shrink.ops.columns import GridColumns
from hf_shrink.ops.grid import Grid, dequantize, search_grid
from hf_shrink.ops.linalg import damped_inverse_factor, dead_channels, relative_error
from hf_shrink.plan import Scheme
from hf_shrink.quantization.base import METHODS, QuantizedWeight
from hf_shrink.quantization.descent import descend
from hf_shrink.quantization.drift import corrected

if TYPE_CHECKING:
    from hf_shrink.calibration.statistics import InputStatistics


@METHODS.register("gptq")
@dataclass(frozen=True)
class GPTQ:
    """GPTQ with a scale search and, after it, rounds of coordinate descent.

    Attributes:
        damping: fraction of the mean second moment that is added to the Hessian's diagonal; grown where Cholesky fails.
        act_order: round the columns with the largest second moment first.
        block_size: columns after which the errors are applied to all later columns; changes speed only.
        refinements: rounds of coordinate descent on integers and scales after GPTQ's own pass.
        asymmetric: aim at the dense model's outputs on the compressed model's inputs, as far as held-out tokens gain
            by it; see `drift.py`.
    """

    damping: float = 0.01
    act_order: bool = True
    block_size: int = 64
    refinements: int = 1
    asymmetric: bool = True
    needs_statistics: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise ValueError(f"damping must be above 0, not {self.damping!r}")
        for name, least in (("block_size", 1), ("refinements", 0)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, not {getattr(self, name)!r}")

    @property
    def follows_dense(self) -> bool:
        """Statistics should have a drift."""
        return self.asymmetric

    def solve(
        self, weight: Tensor, scheme: Scheme, statistics: InputStatistics | None, *, scale_dtype: torch.dtype
    ) -> QuantizedWeight:
        """See `QuantizationMethod.solve`."""
        if statistics is None or statistics.tokens == 0:
            raise CalibrationError("GPTQ has seen no inputs of this Linear; use more calibration data, or method: rtn")
        weight, hessian = weight.detach(), statistics.mean.to(weight.device)
        if self.asymmetric:
            weight, _ = corrected(weight, statistics, self.damping)
        diagonal = hessian.diagonal()
        order = diagonal.argsort(descending=True, stable=True)
        if not self.act_order:
            order = order.sort().values
        factor = damped_inverse_factor(hessian[order][:, order], self.damping)
        damped = hessian.clone()
        damped.diagonal().add_(factor.damping * diagonal.mean() if diagonal.any() else 1.0)

        # Weighting by U_jj^-2, what an error costs once later columns have made up for it, lowers the layer's error
        # but raises the model's (SmolLM2-135M, W4 g64: KL divergence 0.126 instead of 0.095).
        grid = search_grid(weight, scheme, damped.diagonal(), scale_dtype)
        values = round_columns(weight, grid, order, factor.upper.float(), self.block_size)
        if self.refinements:
            values, grid = descend(weight, values, grid, damped, self.refinements)
        error = relative_error(weight, dequantize(values, grid), hessian)
        return QuantizedWeight(values, grid, error, self._notes(hessian, factor.damping))

    def _notes(self, hessian: Tensor, damping: float) -> tuple[str, ...]:
        notes = []
        if dead := int(dead_channels(hessian).sum()):
            notes.append(
                f"{dead} of {len(hessian)} input channels were always zero; their weights are rounded to nearest"
            )
        if damping > self.damping:
            notes.append(f"damping grew from {self.damping:g} to {damping:g} until the Hessian could be factored")
        return tuple(notes)


def round_columns(weight: Tensor, grid: Grid, order: Tensor, upper: Tensor, block_size: int) -> Tensor:
    """GPTQ's pass over the columns.

    Args:
        weight: (out, in) float32.
        grid: of the weight, fixed during the pass.
        order: (in,) the columns in the order they are rounded.
        upper: (in, in) float32 upper Cholesky factor U of the inverse Hessian, in that order.
        block_size: columns worked on before all later ones are updated.

    Returns:
        Integers, int8 (out, in), columns in the weight's own order.
    """
    columns = GridColumns(grid, len(weight), order)
    remaining = columns.place(weight)
    steps = torch.empty_like(remaining)
    errors = torch.empty_like(remaining[:block_size])
    pivots = upper.diagonal().tolist()
    for start in range(0, len(order), block_size):
        stop = min(start + block_size, len(order))
        for j in range(start, stop):
            group, column, error = columns.group_of[j], remaining[j], errors[j - start]
            if j > start:  # make up for the earlier columns of this block
                column.addmv_(errors[: j - start].T, upper[start:j, j], alpha=-1)
            torch.mul(column, columns.inverse[group], out=steps[j])
            columns.round_(steps[j], j)
            torch.addcmul(column, steps[j], columns.scale[group], value=-1, out=error).div_(pivots[j])
        # ... and let all later blocks make up for this one
        remaining[stop:].addmm_(upper[start:stop, stop:].T, errors[: stop - start], alpha=-1)
    return columns.values(steps)
