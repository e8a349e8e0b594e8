"""Refit what reads the kept units, so that it makes up for the ones that are gone and for errors of earlier blocks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.ops.linalg import damped_cholesky, least_squares_refit, solve_factored

LONGEST = 4.0  # medians: no token counts for more than 16 ordinary ones
DAMPING = 0.01  # of the mean second moment: pulls towards the weights as they are where the data says little


class Refitted(NamedTuple):
    """A matrix on its kept inputs.

    Attributes:
        weight: float32 (out, k).
        bias: float32 (out,); None where there is none.
        followed: how much of the correction towards the dense model was taken, 0 to 1.
    """

    weight: Tensor
    bias: Tensor | None
    followed: float


def refit_reader(
    weight: Tensor, bias: Tensor | None, statistics: InputStatistics, kept: Tensor, damping: float = DAMPING
) -> Refitted:
    """The weight and bias of `output` or `down` on the kept inputs that best reproduce the outputs on all of them.

    With a `drift` in the statistics, the outputs are those of the dense model on its own inputs: min over V of
    E||W (x + d) - V x_kept||^2 = W E[(x + d) x_kept^T] E[x_kept x_kept^T]^-1. Of what that changes, tokens that were
    held out say how much is taken. With a bias, what goes leaves its mean in the bias, as in FLAP (An et al., arXiv
    2312.11983), by the same least squares.

    Args:
        weight: W, (out, in) float32, before anything is cut.
        bias: (out,) float32 or None.
        statistics: of its inputs, taken before anything is cut.
        kept: int64 (k,), ascending positions of the kept inputs.

    Raises:
        CalibrationError: the statistics are not finite, or no damping makes them invertible.
    """
    weight = weight.float()
    if bias is None:
        return Refitted(*_solved(weight, statistics, kept, damping))
    mean_square = float(statistics.mean.diagonal().double().mean())
    size = mean_square**0.5 or 1.0  # as large as the other inputs, so that damping weighs alike
    widened = torch.cat([weight, bias.float()[:, None] / size], dim=1)
    kept = torch.cat([kept, kept.new_tensor([weight.shape[1]])])
    found, _, followed = _solved(widened, statistics.with_constant(size), kept, damping)
    return Refitted(found[:, :-1], found[:, -1] * size, followed)


def _solved(weight: Tensor, statistics: InputStatistics, kept: Tensor, damping: float) -> tuple[Tensor, None, float]:
    kept = kept.to(weight.device)
    found = least_squares_refit(weight, statistics.mean, kept, damping)
    drift = statistics.drift
    if drift is None or drift.measured.tokens == 0:
        return found, None, 0.0
    measured, held = drift.measured, drift.held
    lower, _ = damped_cholesky(measured.hessian[kept][:, kept] / measured.tokens, damping)
    moved = weight.double() @ (measured.cross[:, kept].double() / measured.tokens)
    change = solve_factored(lower, moved.T).T.float()
    # On the held-out tokens: E||W (x + d) - (V + part * change) x_kept||^2 is least at gain / size.
    gap = weight.clone()
    gap[:, kept] -= found
    left = gap @ held.hessian[:, kept] + weight @ held.cross[:, kept]
    gain = (left * change).sum(dtype=torch.float64)
    size = (change @ held.hessian[kept][:, kept] * change).sum(dtype=torch.float64)
    part = float((gain / size).clamp(0, 1)) if size > 0 else 0.0
    return found + part * change, None, part
