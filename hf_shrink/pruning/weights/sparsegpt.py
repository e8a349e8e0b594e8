"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774): Optimal Brain Surgeon, column by column.

Setting w_j to zero costs w_j² / [H⁻¹]_jj once all weights not yet passed make up for it. The mask is chosen for a block
of columns when the sweep reaches it (for N:M: for the next M columns), on the weights as they have become by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from hf_shrink.errors import CalibrationError
from hf_shrink.ops.linalg import damped_inverse_factor
from hf_shrink.ops.masks import pruned, whole
from hf_shrink.pruning.base import WEIGHTS, Masked, WeightView
from hf_shrink.sparsity import Amount

if TYPE_CHECKING:
    from hf_shrink.calibration.statistics import InputStatistics


@WEIGHTS.register("sparsegpt")
@dataclass(frozen=True)
class SparseGPT:
    """OBS masks and updates in one sweep over the columns.

    Attributes:
        damping: fraction of the mean second moment that is added to the Hessian's diagonal; grown where Cholesky fails.
        block_size: columns for which a mask is chosen at once, over all rows together; cut to a multiple of M for N:M.
    """

    damping: float = 0.01
    block_size: int = 128
    needs_statistics: ClassVar[bool] = True
    changes_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise ValueError(f"damping must be above 0, not {self.damping!r}")
        if not isinstance(self.block_size, int) or self.block_size < 1:
            raise ValueError(f"block_size must be a whole number of at least 1, not {self.block_size!r}")

    def prune(self, views: Sequence[WeightView], statistics: InputStatistics | None) -> list[Masked]:
        """See `WeightsMethod.prune`."""
        if statistics is None or statistics.tokens == 0:
            raise CalibrationError("sparsegpt needs statistics of the inputs; pass calibration data, or use magnitude")
        factor = damped_inverse_factor(statistics.mean, self.damping)
        notes: tuple[str, ...] = ()
        if factor.damping > self.damping:
            notes = (f"damping grew from {self.damping:g} to {factor.damping:g} until the Hessian could be factored",)
        found = []
        for view in views:
            rows, kept = sweep(view.rows, view.amount, factor.upper.to(view.rows), self.block_size)
            found.append(Masked(rows, kept, notes))
        return found


def sweep(weight: Tensor, amount: Amount, upper: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Choose masks and update weights, column by column.

    Args:
        weight: (out, in) float32.
        amount: a sparsity is met exactly, over the whole matrix.
        upper: (in, in) float32 upper Cholesky factor U of the inverse Hessian: U_jj² is [H⁻¹]_jj once the columns
            before j are fixed.
        block_size: columns after which the errors are applied to all later columns, and for which a mask is chosen.

    Returns:
        The weight with its zeros, (out, in), and the mask of what is kept, bool (out, in).
    """
    rest = weight.t().contiguous()  # one column is one contiguous row
    columns, rows = rest.shape
    zeros = torch.zeros_like(rest, dtype=torch.bool)
    pivots = upper.diagonal()
    step = 1
    if amount.pattern is not None:
        step = amount.numbers[1]
        block_size = max(block_size - block_size % step, step)
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        errors = torch.empty_like(rest[start:stop])
        if amount.pattern is None:
            here = _for_block(amount, rows, start, stop, columns)
            zeros[start:stop] = _chosen(rest[start:stop], pivots[start:stop], here)
        for j in range(start, stop):
            if amount.pattern is not None and j % step == 0:
                zeros[j : j + step] = _chosen(rest[j : j + step], pivots[j : j + step], amount)
            error = torch.where(zeros[j], rest[j], 0.0) / pivots[j]
            rest[j].masked_fill_(zeros[j], 0.0)
            rest[j + 1 : stop].addr_(upper[j, j + 1 : stop], error, alpha=-1)
            errors[j - start] = error
        rest[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
    return rest.t().contiguous(), ~zeros.t().contiguous()


def _for_block(amount: Amount, rows: int, start: int, stop: int, columns: int) -> Amount:
    """What the columns from `start` to `stop` give, so that the fractions of all blocks add up to the exact count."""
    if amount.sparsity is None:
        return amount
    total = whole(amount.sparsity * rows * columns)
    before, after = (total * edge // columns for edge in (start, stop))
    return Amount(sparsity=(after - before) / (rows * (stop - start)))


def _chosen(block: Tensor, pivots: Tensor, amount: Amount) -> Tensor:
    """bool (columns, out) of the weights in a block (columns, out) that become zero."""
    saliency = (block / pivots[:, None]).square()
    return pruned(saliency.t(), amount, by_row=False).t()
