"""Which inputs a Linear can best do without: the structured optimal brain surgeon on a second moment, in float64.

Without the inputs R, and with the best update of the weights on the others, a Linear W whose inputs have the second
moment H loses tr(W_R (H^-1_RR)^-1 W_R^T) of its output. After a removal the weights are W - W_R (H^-1_RR)^-1 H^-1_R:
and the inverse is H^-1 - H^-1_:R (H^-1_RR)^-1 H^-1_R: (block elimination), so the next one is judged on what is left.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_shrink.ops.linalg import damped_cholesky, solve_positive

PANEL = 64  # columns of updates that wait before they are multiplied into the inverse and the weight


@dataclass(frozen=True)
class RemovalCurve:
    """All units in the order in which they go, and what is lost on the way.

    Attributes:
        order: int64 (units,).
        losses: float64 (units,), ascending: what is lost in all once the first k + 1 units of the order are gone.
        alone: float64 (units,), what is lost when only that unit goes.
    """

    order: Tensor
    losses: Tensor
    alone: Tensor

    @property
    def total(self) -> float:
        """What is lost when everything goes."""
        return float(self.losses[-1])

    def scaled(self, factor: float) -> RemovalCurve:
        return RemovalCurve(self.order, self.losses * factor, self.alone * factor)


def removal_curve(
    weight: Tensor, moment: Tensor, damping: float, *, width: int = 1, groups: int | None = None
) -> RemovalCurve:
    """Remove the unit that costs least, update what is left, and so on.

    Args:
        weight: W, (out, units * width), the columns of a unit side by side.
        moment: the mean of x x^T over the inputs, ordered as the columns.
        damping: fraction of the mean second moment that is added to the diagonal. Grown tenfold until Cholesky holds.
        width: columns a unit.
        groups: the units are so many rows of equal length, and all rows lose a unit before any loses its next. None:
            no such rule.

    Raises:
        CalibrationError: NaN or Inf in the moment, or no damping helps.
    """
    lower, _ = damped_cholesky(moment, damping)
    surgeon = _Surgeon(weight, torch.cholesky_inverse(lower), width)
    alone = surgeon.costs()
    units = len(alone)
    row = torch.arange(units, device=weight.device) // (units // (groups or 1))
    order = torch.empty(units, dtype=torch.long)
    losses = torch.empty(units, dtype=torch.float64)
    lost = 0.0
    waiting = torch.ones(units, dtype=torch.bool, device=weight.device)  # may still go in this round
    for step in range(units):
        if groups is not None and step % groups == 0:
            waiting.fill_(True)
        place = int(surgeon.costs().masked_fill(~waiting[surgeon.left], float("inf")).argmin())
        order[step] = surgeon.left[place]
        if groups is not None:
            waiting[row == row[surgeon.left[place]]] = False
        lost += surgeon.remove(place)
        losses[step] = lost
    return RemovalCurve(order, losses, alone.cpu())


class _Surgeon:
    """Weights and inverse without the units removed so far. Updates wait in panels: A - P Q^T instead of A.

    Attributes:
        left: int64 (places,), the units that were left when the panels were last worked in; some of them may be gone.
    """

    def __init__(self, weight: Tensor, inverse: Tensor, width: int) -> None:
        self._weight = weight.double().T.contiguous()  # (in, out): the columns of a unit are rows, side by side
        self._inverse = inverse
        self._width = width
        self.left = torch.arange(len(inverse) // width, device=inverse.device)
        self._begin()

    def _begin(self) -> None:
        size, width = len(self._inverse), self._width
        self._there = torch.ones(size // width, dtype=torch.bool, device=self._inverse.device)
        # The inverse is inverse - panel panel^T, the weight (in, out) is weight - panel moved^T.
        self._panel = self._inverse.new_empty(size, max(PANEL, width))
        self._moved = self._inverse.new_empty(self._weight.shape[1], max(PANEL, width))
        self._used = 0
        # Every unit's block on the inverse's diagonal, and the products of its weight columns with one another.
        places = torch.arange(size // width, device=self._inverse.device)
        self._blocks = self._inverse.view(size // width, width, -1, width)[places, :, places]
        columns = self._weight.view(size // width, width, -1)
        self._grams = columns @ columns.mT

    def costs(self) -> Tensor:
        """float64 (places,), what each unit's removal would lose now; infinite where it is gone."""
        if self._width == 1:
            costs = (self._grams / self._blocks)[:, 0, 0]
        else:
            blocks = torch.where(self._there[:, None, None], self._blocks, torch.eye(self._width).to(self._blocks))
            costs = solve_positive(blocks, self._grams).diagonal(dim1=1, dim2=2).sum(-1)
        return torch.where(self._there, costs, float("inf"))

    def remove(self, place: int) -> float:
        """Remove a unit and update what is left; returns what that loses."""
        own = slice(place * self._width, (place + 1) * self._width)
        before, moved_before = self._panel[:, : self._used], self._moved[:, : self._used]
        inverse = self._inverse[own] - before[own] @ before.T  # (width, in)
        weight = self._weight[own] - before[own] @ moved_before.T  # (width, out)
        lower = torch.linalg.cholesky(inverse[:, own])
        panel = torch.linalg.solve_triangular(lower, inverse, upper=False)  # (width, in)
        moved = torch.linalg.solve_triangular(lower, weight, upper=False)  # (width, out)
        shared = moved @ self._weight.T - (moved @ moved_before) @ before.T  # (width, in)
        self._update(panel, moved, shared)
        self._there[place] = False
        stop = self._used + self._width
        self._panel[:, self._used : stop], self._moved[:, self._used : stop] = panel.T, moved.T
        self._used = stop
        if stop + self._width > self._panel.shape[1] and self._there.any():
            self._settle()
        return float(moved.square().sum())

    def _update(self, panel: Tensor, moved: Tensor, shared: Tensor) -> None:
        """Blocks and grams once panel^T moved has been taken off the weight."""
        width = self._width
        step = panel.T.reshape(-1, width, width)  # (places, columns, removed columns)
        across = shared.T.reshape(-1, width, width) @ step.mT
        self._blocks -= step @ step.mT
        self._grams += step @ (moved @ moved.T) @ step.mT - across - across.mT

    def _settle(self) -> None:
        """Work the panels in, and leave out what is gone."""
        columns = self._there.repeat_interleave(self._width)
        panel, moved = self._panel[columns, : self._used], self._moved[:, : self._used]
        self._inverse = self._inverse[columns][:, columns].addmm_(panel, panel.T, alpha=-1)
        self._weight = self._weight[columns].addmm_(panel, moved.T, alpha=-1)
        self.left = self.left[self._there]
        self._begin()
