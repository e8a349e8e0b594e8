"""Second moments of a Linear's input, the one statistic that quantization and pruning share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_shrink.errors import CalibrationError

_PANEL = 384  # columns a panel of the symmetric product; smaller wastes less, larger multiplies faster


@dataclass
class Drift:
    """How inputs differ from the dense model's for the same tokens: x here, x + d there.

    Attributes:
        cross: float32 (in, in), sum of d xᵀ.
        tokens: how many rows were added.
        held_cross, held_hessian: sums of d xᵀ and x xᵀ over other tokens, to check a correction with.
    """

    cross: Tensor
    held_cross: Tensor
    held_hessian: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, in_features: int, device: torch.device | str = "cpu") -> Drift:
        cross, held_cross, held_hessian = torch.zeros(3, in_features, in_features, device=device).unbind()
        return cls(cross, held_cross, held_hessian)

    def add(self, x: Tensor, dense: Tensor, *, held_out: bool) -> None:
        """Add a batch of inputs (..., in) and the dense model's for the same tokens."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
        change = dense.reshape(rows.shape).to(torch.float32) - rows
        (self.held_cross if held_out else self.cross).addmm_(change.t(), rows)
        if held_out:
            self.held_hessian.addmm_(rows.t(), rows)
        else:
            self.tokens += len(rows)


@dataclass
class InputStatistics:
    """Running sum of x xᵀ over the tokens that a Linear saw.

    Attributes:
        hessian: float32 (in, in), the sum (the Hessian of the squared output error, up to a factor of 2).
        tokens: how many rows were added.
        largest: float32 (in,), each input's largest absolute value; None where it was not kept.
        drift: from the dense model's inputs, where it was followed along.
    """

    hessian: Tensor
    tokens: int = 0
    largest: Tensor | None = None
    drift: Drift | None = None

    @classmethod
    def empty(cls, in_features: int, device: torch.device | str = "cpu") -> InputStatistics:
        moments = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        return cls(moments, largest=torch.zeros(in_features, dtype=torch.float32, device=device))

    @property
    def mean(self) -> Tensor:
        """float32 (in, in): hessian / tokens."""
        return self.hessian / max(self.tokens, 1)

    def add(self, x: Tensor) -> None:
        """Add a batch of inputs (..., in) of any float dtype. Only the lower panels are computed; see `finish`."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
        size = rows.shape[1]
        columns = rows.t()
        for start in range(0, size, _PANEL):
            stop = min(start + _PANEL, size)
            self.hessian[start:, start:stop].addmm_(columns[start:], rows[:, start:stop])
        if self.largest is not None and len(rows):
            low, high = rows.aminmax(dim=0)
            self.largest = torch.maximum(self.largest, torch.maximum(-low, high))
        self.tokens += rows.shape[0]

    def add_drift(self, x: Tensor, dense: Tensor, *, held_out: bool) -> None:
        """Add to the drift: a batch of inputs (..., in) and the dense model's for the same tokens."""
        if self.drift is None:
            self.drift = Drift.empty(x.shape[-1], x.device)
        self.drift.add(x, dense, held_out=held_out)

    def finish(self, name: str) -> InputStatistics:
        """Mirror the lower triangle. Raises CalibrationError naming `name` for absent inputs or ones not finite."""
        if self.tokens == 0:
            raise CalibrationError(f"{name} saw no calibration tokens; give more or other calibration data")
        lower = torch.tril(self.hessian)
        self.hessian = lower + torch.tril(self.hessian, -1).t()
        if not torch.isfinite(self.hessian).all():
            raise CalibrationError(
                f"NaN or Inf in the inputs of {name} during calibration; check the weights and the data"
            )
        return self
