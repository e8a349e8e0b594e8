"""Linear algebra on second moments: factors of a damped inverse, and least squares in closed form, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_shrink.errors import CalibrationError

LARGEST_DAMPING = 1e3
_LEAF = 256  # rows of a triangle that is inverted at once


@dataclass(frozen=True)
class InverseFactor:
    """An upper triangular U with U^T U = (moment + damping * mean(diagonal) * I)^-1, its channels in some order.

    Attributes:
        upper: (n, n), in the dtype that was asked for.
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


def solve_factored(lower: Tensor, right: Tensor) -> Tensor:
    """X, (n, m), of L L^T X = B, for a lower triangular L. Unlike `cholesky_solve` it makes no copy of L."""
    half: Tensor = torch.linalg.solve_triangular(lower, right, upper=False)
    whole: Tensor = torch.linalg.solve_triangular(lower.mT, half, upper=True)
    return whole


def dead_channels(moment: Tensor) -> Tensor:
    """(n,) bool: the channels whose input was always zero."""
    return moment.diagonal() == 0


def damped_inverse_factor(
    moment: Tensor, damping: float, order: Tensor | None = None, dtype: torch.dtype = torch.float64
) -> InverseFactor:
    """The upper Cholesky factor of the inverse of a damped second moment, as GPTQ uses it.

    Args:
        moment: (n, n) symmetric, any float dtype. Dead channels are fine: damping keeps them apart from the others.
        damping: fraction of the mean diagonal that is added to it. Grown tenfold until Cholesky holds.
        order: (n,) a permutation of the channels to take them in; None: as they are.
        dtype: of what is returned; it is computed in float64.

    Raises:
        CalibrationError: NaN or Inf in the moment, or no damping helps.
    """
    order = torch.arange(len(moment), device=moment.device) if order is None else order
    # Of the matrix with its order reversed, Cholesky gives moment = R R^T with R upper triangular, and U = R^-1.
    backwards = order.flip(0)
    lower, used = damped_cholesky(moment[backwards[:, None], backwards], damping)
    invert_lower_(lower)
    lower = lower.to(dtype)  # the largest inputs are tens of thousands wide: what is not needed any more goes at once
    return InverseFactor(lower.flip(0, 1), used, order)


def invert_lower_(lower: Tensor) -> None:
    """Invert a lower triangular matrix, (n, n), in place.

    Half by half, since the inverse of [[A, 0], [B, C]] is [[A^-1, 0], [-C^-1 B A^-1, C^-1]]: mostly products, and a
    quarter of the matrix beside it, where `solve_triangular` needs twice as much as the matrix.
    """
    size, half = len(lower), len(lower) // 2
    if size <= _LEAF:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    first, between, second = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    invert_lower_(first)
    invert_lower_(second)
    torch.addmm(between, second @ between, first, beta=0, alpha=-1, out=between)


def damped_cholesky(moment: Tensor, damping: float) -> tuple[Tensor, float]:
    """The lower Cholesky factor, (n, n) float64, of a damped second moment, and the damping used.

    Raises:
        CalibrationError: as `damped_inverse_factor`.
    """
    check_finite(moment)
    # Column by column, as LAPACK wants it to work in place.
    lower = torch.empty(moment.shape, dtype=torch.float64, device=moment.device).mT
    diagonal = moment.diagonal().double()
    mean = diagonal.mean()
    if mean == 0:  # no input was ever non-zero: every channel counts alike
        return lower.copy_(torch.eye(len(lower), device=lower.device)), damping
    failed = torch.empty((), dtype=torch.int32, device=moment.device)
    used = damping
    while used <= LARGEST_DAMPING:
        lower.mT.copy_(moment)  # symmetric, so that it can be read in the order in which it lies
        lower.diagonal().copy_(diagonal + used * mean)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not failed:
            return lower, used
        used = max(used * 10, 1e-6)
    raise CalibrationError(
        f"the statistics of the inputs are not a second moment: Cholesky fails even with damping {LARGEST_DAMPING:g}; "
        "check the calibration data"
    )


@contextmanager
def damped(moment: Tensor, damping: float) -> Iterator[None]:
    """Inside, `moment` itself has `damping` times the mean on its diagonal; 1 where no input was ever non-zero."""
    diagonal = moment.diagonal().clone()
    mean = diagonal.mean()
    moment.diagonal().add_(damping * mean if mean > 0 else 1.0)
    try:
        yield
    finally:
        moment.diagonal().copy_(diagonal)


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
    update = solve_factored(lower, lost.T).T
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
    return weight.double() + solve_factored(lower, missing.T).T


def relative_error(weight: Tensor, approximation: Tensor, moment: Tensor | None) -> float:
    """tr(D H D^T) / tr(W H W^T) with D = W - approximation: the outputs' relative squared error.

    H is `moment`, (in_features, in_features), or the identity when None. 0 where the outputs are all zero.
    """
    difference = weight - approximation
    moved, whole = (difference, weight) if moment is None else (difference @ moment, weight @ moment)
    lost = torch.sum(moved * difference, dtype=torch.float64).item()
    total = torch.sum(whole * weight, dtype=torch.float64).item()
    return max(lost, 0.0) / total if total > 0 else 0.0
