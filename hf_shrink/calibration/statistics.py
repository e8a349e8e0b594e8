"""Second moments of a Linear's input, the one statistic that quantization and pruning share."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_shrink.errors import CalibrationError

_PANEL = 384  # columns a panel of the symmetric product; smaller wastes less, larger multiplies faster


@dataclass
class Drift:
    """How inputs differ from the dense model's for the same tokens: x here, x + d there.

    Attributes:
        measured: sums over the tokens that corrections are made from.
        held: sums over other tokens, to check a correction with.
        corrections: how many are still to be made. `measured` is given up after the last of them. None: not known.
    """

    measured: DriftSums
    held: DriftSums
    corrections: int | None = None

    @classmethod
    def empty(cls, in_features: int, device: torch.device | str = "cpu") -> Drift:
        return cls(DriftSums.empty(in_features, device), DriftSums.empty(in_features, device))

    def with_constant(self, size: float) -> Drift:
        """As if inputs had one more feature, always `size`, which never drifts."""
        return Drift(self.measured.with_constant(size), self.held.with_constant(size))

    def corrected_once(self) -> None:
        """A correction was made. With the last one go two matrices, each as wide and as high as there are inputs."""
        if self.corrections is not None:
            self.corrections -= 1
            if self.corrections == 0:
                self.measured = DriftSums.empty(0)


@dataclass
class DriftSums:
    """Sums over the tokens of some batches.

    Attributes:
        cross: float32 (in, in), sum of d xᵀ.
        hessian: float32 (in, in), sum of x xᵀ over the same tokens. A correction is a regression of d on x, and with
            the second moment of other tokens the noise of x itself would come into it.
        shift: float64 (in,), sum of d.
        total: float64 (in,), sum of x.
        tokens: how many rows were added.
        weight: the same, a shortened row as the square of its factor.
    """

    cross: Tensor
    hessian: Tensor
    shift: Tensor
    total: Tensor
    tokens: int = 0
    weight: float = 0.0

    @classmethod
    def empty(cls, in_features: int, device: torch.device | str = "cpu") -> DriftSums:
        cross, hessian = (torch.zeros(in_features, in_features, device=device) for _ in range(2))
        shift, total = torch.zeros(2, in_features, dtype=torch.float64, device=device).unbind()
        return cls(cross, hessian, shift, total)

    def add(self, rows: Tensor, change: Tensor, factors: Tensor) -> None:
        """Add x and d, both float32 (n, in) and shortened by `factors` (n, 1)."""
        self.cross.addmm_(change.t(), rows)
        add_symmetric(self.hessian, rows)
        self.shift += summed(change, factors)
        self.total += summed(rows, factors)
        self.weight += float(factors.square().sum(dtype=torch.float64))
        self.tokens += len(rows)

    def with_constant(self, size: float) -> DriftSums:
        """As if inputs had one more feature, always `size`, which never drifts."""
        zero, total = torch.zeros_like(self.shift), size * self.total
        cross = _bordered(self.cross, size * self.shift, zero, 0.0)
        hessian = _bordered(self.hessian, total, total, size**2 * self.weight)
        return DriftSums(cross, hessian, zero, zero, self.tokens, self.weight)


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

    def narrowed(self, kept: Tensor) -> InputStatistics:
        """Of the inputs at the positions `kept` alone, int64 (k,); without a drift."""
        kept = kept.to(self.hessian.device)
        return replace(
            self,
            hessian=self.hessian[kept][:, kept],
            largest=None if self.largest is None else self.largest[kept],
            total=None if self.total is None else self.total[kept],
            drift=None,
        )

    def evened(self, share: float) -> InputStatistics:
        """As if others had come beside these inputs, in all directions alike and together `share` times as strong."""
        even = share * self.hessian.diagonal().mean()
        return InputStatistics(self.hessian + even * torch.eye(len(self.hessian), device=even.device), self.tokens)

    def with_constant(self, size: float) -> InputStatistics:
        """As if inputs had one more feature, always `size`: what a bias is to a weight."""
        assert self.total is not None
        hessian = _bordered(self.hessian, size * self.total, size * self.total, size**2 * self.weight)
        drift = None if self.drift is None else self.drift.with_constant(size)
        return InputStatistics(hessian, self.tokens, drift=drift)

    def add(self, x: Tensor) -> None:
        """Add a batch of inputs (..., in) of any float dtype. Only the lower panels are computed; see `finish`."""
        rows, _ = self._counted(x)
        add_symmetric(self.hessian, rows)

    def add_drift(self, x: Tensor, dense: Tensor, *, held_out: bool) -> None:
        """As `add`, and to the drift: the dense model's inputs for the same tokens are known."""
        if self.drift is None:
            self.drift = Drift.empty(x.shape[-1], x.device)
        rows, factors = self._counted(x)
        change = dense.reshape(rows.shape).to(torch.float32) * factors - rows
        (self.drift.held if held_out else self.drift.measured).add(rows, change, factors)

    def _counted(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A batch as rows, float32 (n, in), shortened by the factors (n, 1); with all but second moments added up."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
        factors = shortening(rows, self.longest)
        rows = rows if self.longest is None else rows * factors
        if self.largest is not None and len(rows):
            self.largest = torch.maximum(self.largest, rows.abs().amax(dim=0))
        if self.total is not None:
            self.total += summed(rows, factors)
        self.weight += float(factors.square().sum(dtype=torch.float64))
        self.tokens += rows.shape[0]
        return rows, factors

    def finish(self, name: str) -> InputStatistics:
        """Make the Hessians whole. Raises CalibrationError naming `name` for absent inputs or ones not finite."""
        if self.tokens == 0:
            raise CalibrationError(f"{name} saw no calibration tokens; give more or other calibration data")
        for sums in () if self.drift is None else (self.drift.measured, self.drift.held):
            self.hessian += sums.hessian
            _mirror_(sums.hessian)
        _mirror_(self.hessian)
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


def summed(rows: Tensor, factors: Tensor) -> Tensor:
    """float64 (in,), the sum of float32 rows (n, in), each times its factor (n, 1).

    Sums in float32 are not good enough: what an input that hardly varies has of variance is a small difference of them.
    """
    return (rows * factors).sum(0, dtype=torch.float64)


def add_symmetric(sums: Tensor, rows: Tensor) -> None:
    """Add rowsᵀ rows, of which only the panels from the diagonal down are computed, to (in, in) sums."""
    size, columns = rows.shape[1], rows.t()
    for start in range(0, size, _PANEL):
        stop = min(start + _PANEL, size)
        sums[start:, start:stop].addmm_(columns[start:], rows[:, start:stop])


def _mirror_(lower: Tensor) -> None:
    """Make a matrix whose lower triangle is given the symmetric one, in place."""
    for start in range(0, len(lower), _PANEL):
        stop = min(start + _PANEL, len(lower))
        corner, below = lower[start:stop, start:stop], lower[stop:, start:stop]
        corner.copy_(torch.tril(corner) + torch.tril(corner, -1).t())
        lower[start:stop, stop:] = below.t()


def _bordered(matrix: Tensor, column: Tensor, row: Tensor, corner: float) -> Tensor:
    """The float32 (n, n) matrix with one column and one row more."""
    whole = matrix.new_empty(len(matrix) + 1, len(matrix) + 1)
    whole[:-1, :-1], whole[:-1, -1], whole[-1, :-1], whole[-1, -1] = matrix, column.to(matrix), row.to(matrix), corner
    return whole
