"""Coordinate descent on a quantized weight (as in QuantEase, Behdin et al., arXiv 2309.01885), scales included.

Each step minimises tr(D H D^T), D = W - dequantized, over one scale or one integer of every row while all else
stands still, so no step makes a row worse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_shrink.ops.columns import GridColumns
from hf_shrink.ops.grid import Grid, stored_scale

BLOCK = 64


def descend(
    weight: Tensor, values: Tensor, grid: Grid, hessian: Tensor, rounds: int, kept: Tensor | None = None
) -> tuple[Tensor, Grid]:
    """`rounds` times over all groups: refit the group's scales, then its integers, one column at a time.

    Args:
        weight: (out, in) float32.
        values, grid: what it is rounded to so far. The scale of strategy "tensor" is left as it is.
        hessian: (in, in) float32, positive on the diagonal.
        kept: bool (out, in) of the weights that may be anything but zero; None: all. The others are zero in `values`.

    Returns:
        The better values, int8 (out, in), and grid.
    """
    columns = GridColumns(grid, len(weight), torch.arange(weight.shape[1], device=weight.device))
    steps = columns.steps(values)
    mask = None if kept is None else columns.place(kept.float())
    gradient = hessian @ columns.place(weight - _dequantized(columns, steps))  # H D^T, (in, out)
    width = grid.scheme.group_size or weight.shape[1]
    for _ in range(rounds):
        for group, first in enumerate(range(0, weight.shape[1], width)):
            if grid.scheme.strategy != "tensor":
                _refit_scale(columns, group, slice(first, first + width), steps, gradient, hessian)
            for start in range(first, first + width, BLOCK):
                stop = min(start + BLOCK, first + width)
                _descend_block(columns, group, start, stop, steps, gradient, hessian, mask)
    return columns.values(steps), columns.as_grid()


def _dequantized(columns: GridColumns, steps: Tensor) -> Tensor:
    return (steps * columns.scale[columns.group_of])[:, : columns.out_features].T


def _refit_scale(
    columns: GridColumns, group: int, span: slice, steps: Tensor, gradient: Tensor, hessian: Tensor
) -> None:
    """Each row's best scale of one group, as it will be stored; kept where rounding it would undo the gain."""
    scale = columns.scale[group]
    slope = (steps[span] * gradient[span]).sum(0)
    curvature = (steps[span] * (hessian[span, span] @ steps[span])).sum(0)
    best = stored_scale(scale + slope / curvature, columns.grid.scale.dtype).float()
    change = best - scale
    better = (change * (2 * slope - change * curvature) > 0) & (best * scale > 0)
    change = torch.where(better, change, 0.0)
    scale += change
    columns.inverse[group] = scale.reciprocal()
    gradient.addmm_(hessian[:, span], steps[span] * change, alpha=-1)


def _descend_block(
    columns: GridColumns,
    group: int,
    start: int,
    stop: int,
    steps: Tensor,
    gradient: Tensor,
    hessian: Tensor,
    mask: Tensor | None,
) -> None:
    """Each row's best integer for one column after the other; the gradient is brought up to date once, at the end."""
    scale, inverse = columns.scale[group], columns.inverse[group]
    changes = torch.empty_like(steps[start:stop])  # of D^T
    curvature = hessian.diagonal()[start:stop].tolist()
    slope, target = torch.empty_like(scale), torch.empty_like(scale)
    for k, j in enumerate(range(start, stop)):
        if k:
            torch.addmv(gradient[j], changes[:k].T, hessian[start:j, j], out=slope)
        else:
            slope.copy_(gradient[j])
        torch.addcmul(steps[j], slope, inverse, value=1 / curvature[k], out=target)
        columns.round_(target, j)
        if mask is not None:
            target.mul_(mask[j])
        torch.sub(steps[j], target, out=changes[k]).mul_(scale)
        steps[j] = target
    gradient.addmm_(hessian[:, start:stop], changes)
