"""Channel-wise shifts of Outlier Suppression+ (Wei et al., arXiv 2304.09145): a channel that is always far from zero
widens the range of every token, and a constant taken off it costs nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_shrink.transforms.base import TRANSFORMS, Shifting


@TRANSFORMS.register("shift")
@dataclass(frozen=True)
class Shift(Shifting):
    """The constants with which the squared steps of the tokens' grids are least, for schemes that round activations.

    The paper centres every channel. The mean of the squared steps is convex in the constants, so that they are found by
    descent instead, from the best of none, the channels' means and their centres; a quarter of the tokens, on which
    nothing is fitted, decides between all of them.

    Attributes:
        steps: of the descent.
    """

    steps: int = 200

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 0:
            raise ValueError(f"steps must be a whole number of at least 0, not {self.steps!r}")

    def constants(self, rows: Tensor, symmetric: bool) -> Tensor:
        """See `Shifting.constants`."""
        fitted = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        fitted[3::4] = False
        fit, held = (rows[fitted], rows[~fitted]) if len(rows) >= 4 else (rows, rows)
        middle = (fit.amin(0) + fit.amax(0)) / 2
        tried = [torch.zeros_like(middle), fit.mean(0), middle]
        best = min(tried, key=lambda shift: float(squared_step(fit, shift, symmetric)))
        tried.append(self._descended(fit, best, symmetric))
        return min(tried, key=lambda shift: float(squared_step(held, shift, symmetric)))

    def _descended(self, rows: Tensor, start: Tensor, symmetric: bool) -> Tensor:
        with torch.enable_grad():
            shift = start.clone().requires_grad_()
            rate = 0.01 * float(squared_step(rows, start, symmetric).sqrt())
            optimizer = torch.optim.Adam([shift], lr=rate)
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, max(self.steps, 1))
            for _ in range(self.steps):
                optimizer.zero_grad()
                squared_step(rows, shift, symmetric).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
        return shift.detach()


def squared_step(rows: Tensor, shift: Tensor, symmetric: bool) -> Tensor:
    """Mean over tokens of the squared width that a grid must cover: the range with zero in it, or twice the largest."""
    moved = rows - shift
    if symmetric:
        return (2 * moved.abs().amax(1)).square().mean()
    return (moved.amax(1).clamp_min(0) - moved.amin(1).clamp_max(0)).square().mean()
