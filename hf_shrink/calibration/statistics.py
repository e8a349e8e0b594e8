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
        shift: float64 (in,), sum of d.
        held_shift, held_total, held_weight: sums of d and x over the other tokens, and their number.
    """

    cross: Tensor
    held_cross: Tensor
    held_hessian: Tensor
    tokens: int = 0
    shift: Tensor | None = None
    held_shift: Tensor | None = None
    held_total: Tensor | None = None
    held_weight: float = 0.0

    @classmethod
    def empty(cls, in_features: int, device: torch.device | str = "cpu") -> Drift:
        cross, held_cross, held_hessian = torch.zeros(3, in_features, in_features, device=device).unbind()
        shift, held_shift, held_total = torch.zeros(3, in_features, dtype=torch.float64, device=device).unbind()
        return cls(cross, held_cross, held_hessian, 0, shift, held_shift, held_total)

    def add(self, x: Tensor, dense: Tensor, *, held_out: bool, longest: float | None = None) -> None:
        """Add a batch of inputs (..., in) and the dense model's for the same tokens; `longest`: as of the inputs."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
        change = dense.reshape(rows.shape).to(torch.float32) - rows
        factors = shortening(rows, longest)
        rows, change = rows * factors, change * factors
        (self.held_cross if held_out else self.cross).addmm_(change.t(), rows)
        shift = self.held_shift if held_out else self.shift
        if shift is not None:
            shift += (change * factors).sum(0, dtype=torch.float64)
        if held_out:
            self.held_hessian.addmm_(rows.t(), rows)
            self.held_weight += float(factors.square().sum(dtype=torch.float64))
            if self.held_total is not None:
                self.held_total += (rows * factors).sum(0, dtype=torch.float64)
        else:
            self.tokens += len(rows)

    def with_constant(self, size: float) -> Drift:
        """As if inputs had one more feature, always `size`, which never drifts."""
        assert self.shift is not None and self.held_shift is not None and self.held_total is not None
        zero = torch.zeros_like(self.shift)
        return Drift(
            _bordered(self.cross, size * self.shift, zero, 0.0),
            _bordered(self.held_cross, size * self.held_shift, zero, 0.0),
            _bordered(self.held_hessian, size * self.held_total, size * self.held_total, size**2 * self.held_weight),
            self.tokens,
        )


@dataclass
class InputStatistics:
    """Running sum of x xᵀ over the tokens that a Linear saw.

    Attributes:
        hessian: float32 (in, in), the sum (the Hessian of the squared output error, up to a factor of 2).
        tokens: how many rows were added.
        largest: float32 (in,), each input's largest absolute value; None where it was not kept.
        drift: from the dense model's inputs, where it was followed along.
        total: float64 (in,), sum of x; None where it was not kept.
        longest: rows longer than so many times the median length of their batch are shortened to that, with all that
            is added up of them: a token with massive activations else counts for thousands of others. None: no rows.
        weight: how many rows were added, a shortened one as the square of its factor.
    """

    hessian: Tensor
    tokens: int = 0
    largest: Tensor | None = None
    drift: Drift | None = None
    total: Tensor | None = None
    longest: float | None = None
    weight: float = 0.0

    @classmethod
    def empty(
        cls, in_features: int, device: torch.device | str = "cpu", longest: float | None = None
    ) -> InputStatistics:
        moments = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        largest = torch.zeros(in_features, dtype=torch.float32, device=device)
        total = torch.zeros(in_features, dtype=torch.float64, device=device)
        return cls(moments, largest=largest, total=total, longest=longest)

    @property
    def mean(self) -> Tensor:
        """float32 (in, in): hessian / tokens."""
        return self.hessian / max(self.tokens, 1)

    @property
    def covariance(self) -> Tensor:
        """float32 (in, in): the second moment of the inputs without their mean."""
        assert self.total is not None
        own = self.total[:, None] * (self.total / max(self.weight, 1e-30))
        return ((self.hessian.double() - own) / max(self.tokens, 1)).float()

    def with_constant(self, size: float) -> InputStatistics:
        """As if inputs had one more feature, always `size`: what a bias is to a weight."""
        assert self.total is not None
        hessian = _bordered(self.hessian, size * self.total, size * self.total, size**2 * self.weight)
        drift = None if self.drift is None else self.drift.with_constant(size)
        return InputStatistics(hessian, self.tokens, drift=drift)

    def add(self, x: Tensor) -> None:
        """Add a batch of inputs (..., in) of any float dtype. Only the lower panels are computed; see `finish`."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
        factors = shortening(rows, self.longest)
        rows = rows if self.longest is None else rows * factors
        size = rows.shape[1]
        columns = rows.t()
        for start in range(0, size, _PANEL):
            stop = min(start + _PANEL, size)
            self.hessian[start:, start:stop].addmm_(columns[start:], rows[:, start:stop])
        if self.largest is not None and len(rows):
            low, high = rows.aminmax(dim=0)
            self.largest = torch.maximum(self.largest, torch.maximum(-low, high))
        if self.total is not None:
            self.total += (rows * factors).sum(0, dtype=torch.float64)
        self.weight += float(factors.square().sum(dtype=torch.float64))
        self.tokens += rows.shape[0]

    def add_drift(self, x: Tensor, dense: Tensor, *, held_out: bool) -> None:
        """Add to the drift: a batch of inputs (..., in) and the dense model's for the same tokens."""
        if self.drift is None:
            self.drift = Drift.empty(x.shape[-1], x.device)
        self.drift.add(x, dense, held_out=held_out, longest=self.longest)

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


def shortening(rows: Tensor, longest: float | None) -> Tensor:
    """(rows, 1), what to shorten each row by."""
    if longest is None or not len(rows):
        return rows.new_ones(len(rows), 1)
    lengths = rows.norm(dim=1, keepdim=True)
    limit = longest * lengths.median()
    return (limit / lengths.clamp_min(1e-30)).clamp(max=1) if limit > 0 else torch.ones_like(lengths)


def _bordered(matrix: Tensor, column: Tensor, row: Tensor, corner: float) -> Tensor:
    """The float32 (n, n) matrix with one column and one row more."""
    whole = matrix.new_empty(len(matrix) + 1, len(matrix) + 1)
    whole[:-1, :-1], whole[:-1, -1], whole[-1, :-1], whole[-1, -1] = matrix, column.to(matrix), row.to(matrix), corner
    return whole
