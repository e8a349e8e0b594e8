"""Linear algebra on second moments: factors of a damped inverse, and least squares in closed form, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_shrink.errors import CalibrationError

LARGEST_DAMPING = 1e3


@dataclass(frozen=True)
class InverseFactor:
    """An upper triangular U with U^T U = (moment + damping * mean(diagonal) * I)^-1, its channels in some order.

    Attributes:
        upper: (n, n) float64.
        damping: the damping that was used: the asked one, or larger where Cholesky did not hold.
        order: (n,) the channels of the moment in the order in which `upper` has them.
    """

    upper: Tensor
    damping: float
    order: Tensor


def solve_positive(matrix: Tensor, right: Tensor) -> Tensor:
    """X of A X = B for symmetric positive definite matrices A, (..., n, n), and B, (..., n, m).

    By Cholesky, which is half the work of LU. And torch's batched LU (`torch.linalg.solve`, `inv`, `lu`) cannot be
    trusted on a CPU: 2.13 with more than one thread gives wrong numbers for 192 columns and more, not for 128, mostly
    without an error.
    """
    return torch.cholesky_solve(right, torch.linalg.cholesky(matrix))


def dead_channels(moment: Tensor) -> Tensor:
    """(n,) bool: the channels whose input was always zero."""
    return moment.diagonal() == 0


def damped_inverse_factor(moment: Tensor, damping: float, order: Tensor | None = None) -> InverseFactor:
    """The upper Cholesky factor of the inverse of a damped second moment, as GPTQ uses it.

    Args:
        moment: (n, n) symmetric, any float dtype. Dead channels are fine: damping keeps them apart from the others.
        damping: fraction of the mean diagonal that is added to it. Grown tenfold until Cholesky holds.
        order: (n,) a permutation of the channels to take them in; None: as they are.

    Raises:
        CalibrationError: NaN or Inf in the moment, or no damping helps.
    """
    order = torch.arange(len(moment), device=moment.device) if order is None else order
    # Of the matrix with its order reversed, Cholesky gives moment = R R^T with R upper triangular, and U = R^-1.
    backwards = order.flip(0)
    lower, used = damped_cholesky(moment[backwards][:, backwards], damping)
    flipped = lower.flip(0, 1)
    del lower  # the largest inputs are tens of thousands wide: what is not needed any more goes at once
    identity = torch.eye(len(flipped), dtype=flipped.dtype, device=flipped.device)
    upper = torch.linalg.solve_triangular(flipped, identity, upper=True)
    return InverseFactor(upper, used, order)


def damped_cholesky(moment: Tensor, damping: float) -> tuple[Tensor, float]:
    """The lower Cholesky factor, (n, n) float64, of a damped second moment, and the damping used.

    Raises:
        CalibrationError: as `damped_inverse_factor`.
    """
    check_finite(moment)
    double = moment.to(torch.float64, copy=True)
    mean = double.diagonal().mean()
    if mean == 0:  # no input was ever non-zero: every channel counts alike
        return torch.eye(len(double), dtype=double.dtype, device=double.device), damping
    del moment
    diagonal = double.diagonal().clone()
    used = damping
    while used <= LARGEST_DAMPING:
        double.diagonal().copy_(diagonal + used * mean)
        lower, failed = torch.linalg.cholesky_ex(double)
        if not failed:
            return lower, used
        used = max(used * 10, 1e-6)
    raise CalibrationError(
        f"the statistics of the inputs are not a second moment: Cholesky fails even with damping {LARGEST_DAMPING:g}; "
        "check the calibration data"
    )


def damped_moment(moment: Tensor, damping: float) -> Tensor:
    """A copy with `damping` times the mean added to the diagonal; with 1 where no input was ever non-zero."""
    damped = moment.clone()
    mean = moment.diagonal().mean()
    damped.diagonal().add_(damping * mean if mean > 0 else 1.0)
    return damped


def check_finite(moment: Tensor) -> None:
    """Raises CalibrationError where a second moment holds NaN or Inf."""
    if not torch.isfinite(moment).all():
        raise CalibrationError(
            "the statistics of the inputs hold NaN or Inf: the model's activations overflow on the calibration data; "
            "load it in bfloat16 or float32 instead of float16, or check the data"
        )


def least_squares_refit(weight: Tensor, moment: Tensor, kept: Tensor, damping: float) -> Tensor:
    """The weights on the kept channels that best reproduce a Linear's outputs without the others.

    Minimises ||V X_kept - W X||^2 + damping * mean(diagonal) * ||V - W_kept||^2 over V, in closed form: the more
    damping, the nearer to the weights as they are.

    Args:
        weight: W, (out_features, in_features) float32.
        moment: X X^T, or its mean over tokens, (in_features, in_features).
        kept: (k,) indices of the kept input channels.
        damping: fraction of the kept channels' mean second moment. Grown tenfold until Cholesky holds.

    Returns:
        V, (out_features, k) float32.

    Raises:
        CalibrationError: NaN or Inf in the moment or the weight, or no damping helps.
    """
    if not torch.isfinite(weight).all():
        raise CalibrationError("the weight to refit holds NaN or Inf; check the checkpoint")
    check_finite(moment)
    kept = kept.to(weight.device)
    removed = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    removed[kept] = False
    lower, _ = damped_cholesky(moment[kept][:, kept], damping)
    lost = weight[:, removed].double() @ moment[removed][:, kept].double()
    update = torch.cholesky_solve(lost.T, lower).T
    return (weight[:, kept].double() + update).float()


def refit_towards(weight: Tensor, cross: Tensor, moment: Tensor, damping: float) -> Tensor:
    """The weights that best give a target from an input, near to given weights where the input says little.

    Minimises E||V x - y||^2 + damping * mean(diagonal) * ||V - W||^2 over V, in closed form.

    Args:
        weight: W, (out_features, in_features), any float dtype.
        cross: E y x^T, (out_features, in_features).
        moment: E x x^T, (in_features, in_features).
        damping: fraction of the mean second moment. Grown tenfold until Cholesky holds.

    Returns:
        V, float64 (out_features, in_features).

    Raises:
        CalibrationError: NaN or Inf in the moment, or no damping helps.
    """
    lower, _ = damped_cholesky(moment, damping)
    missing = cross.double() - weight.double() @ moment.double()
    return weight.double() + torch.cholesky_solve(missing.T, lower).T


def relative_error(weight: Tensor, approximation: Tensor, moment: Tensor | None) -> float:
    """tr(D H D^T) / tr(W H W^T) with D = W - approximation: the outputs' relative squared error.

    H is `moment`, (in_features, in_features), or the identity when None. 0 where the outputs are all zero.
    """
    difference = weight - approximation
    moved, whole = (difference, weight) if moment is None else (difference @ moment, weight @ moment)
    lost = torch.sum(moved * difference, dtype=torch.float64).item()
    total = torch.sum(whole * weight, dtype=torch.float64).item()
    return max(lost, 0.0) / total if total > 0 else 0.0
