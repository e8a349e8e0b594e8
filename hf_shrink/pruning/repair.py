"""Make up for removed blocks: refit what the others add to the residual stream, so that it is the dense one again.

A block left of a gap hands x + W z on (x: its stream so far, W and z: its last matrix and that one's input), and the
dense model goes on from t, what the gap makes of its own stream. The best map from the one to the other (arXiv
2403.17887 finds that a span of blocks is little more than one; ReplaceMe, arXiv 2505.02819, fits it and multiplies it
into W) could not be folded into a residual stream exactly, because x does not pass through W. The least squares for W
itself, min ||x + W z - t||, can, needs no new parameter, and contains that map's product with W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_shrink.errors import CalibrationError
from hf_shrink.ops.linalg import damped_cholesky, solve_factored
from hf_shrink.sharding import Share

BAND = 512  # columns of a moment that are multiplied at a time
DAMPINGS = (0.03, 0.3, 3.0)  # of the mean second moment: pull towards the weight as it is


@dataclass
class Errors:
    """Sums over tokens that a refit needs, all float32; of x, a matrix's input, and e, what its output should gain.

    Every token counts by 1 / |t|²: norms behind see directions only, and few tokens are many times as long as others.

    Attributes:
        cross, moment: sums of e xᵀ (out, in) and x xᵀ (in, in); until `merge`, only what is in or below the diagonal.
        held_cross, held_moment: the same over tokens held out, which choose the damping.
        size: sum of |e|² / |t|² over the tokens held out.
    """

    cross: Tensor
    moment: Tensor
    held_cross: Tensor
    held_moment: Tensor
    size: float = 0.0

    @classmethod
    def empty(cls, out_features: int, in_features: int, device: torch.device) -> Errors:
        cross = torch.zeros(2, out_features, in_features, device=device)
        moment = torch.zeros(2, in_features, in_features, device=device)
        return cls(cross[0], moment[0], cross[1], moment[1])

    def add(self, x: Tensor, error: Tensor, target: Tensor, *, held_out: bool) -> None:
        """Add tokens: x (n, in), error and target (n, out)."""
        weight = 1 / target.float().square().sum(-1, keepdim=True).clamp_min(1e-20)
        x, error = x.float(), error.float()
        weighted = x * weight
        cross, moment = (self.held_cross, self.held_moment) if held_out else (self.cross, self.moment)
        cross.addmm_(error.T, weighted)
        for start in range(0, x.shape[1], BAND):  # the lower triangle: half of the work
            moment[start:, start : start + BAND].addmm_(x[:, start:].T, weighted[:, start : start + BAND])
        if held_out:
            self.size += float((error.square() * weight).sum(dtype=torch.float64))

    def merge(self, share: Share) -> None:
        """In the end: from sums over this process's tokens to sums over all, and moments to both of their halves."""
        for moment in (self.moment, self.held_moment):
            for start in range(BAND, len(moment), BAND):
                moment[start - BAND : start, start:] = moment[start:, start - BAND : start].T
        share.add_up(self.cross, self.moment, self.held_cross, self.held_moment)
        self.size = share.totals([self.size])[0]


def best_change(errors: Errors) -> tuple[Tensor, float]:
    """What to add to the matrix, (out, in) float32, and the share of the error that goes with it on tokens held out.

    Of three dampings, and of all parts of the change that each gives, the one that serves the tokens held out best;
    zeros and 0.0 where none does.

    Raises:
        CalibrationError: numbers are not finite, or no damping makes the moment invertible.
    """
    if not torch.isfinite(errors.cross).all():
        raise CalibrationError("NaN or Inf in the hidden states; check the weights and the calibration data")
    best, gained = torch.zeros_like(errors.cross), 0.0
    for damping in DAMPINGS:
        lower, _ = damped_cholesky(errors.moment, damping)
        change = solve_factored(lower, errors.cross.double().T).T.float()
        gain = float((errors.held_cross * change).sum(dtype=torch.float64))
        cost = float(((change @ errors.held_moment) * change).sum(dtype=torch.float64))
        part = min(max(gain / cost, 0.0), 1.0) if cost > 0 else 0.0
        less = part * (2 * gain - part * cost)
        if less > gained:
            best, gained = part * change, less
    return best, gained / errors.size if errors.size > 0 else 0.0
