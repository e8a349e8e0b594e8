"""The asymmetric target: what a weight must become to give the dense model's output on the compressed model's input.

Errors of the layers before make an input x out of the dense model's x + d. W (x + d) = V x is best met by
V = W + W E[d x^T] E[x x^T]^-1: rounding V instead of W makes up for these errors too. GPTAQ (Li et al., arXiv
2504.02692) takes the same correction column by column inside GPTQ's sweep; taken before the sweep it is exact, and any
method can round the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_shrink.calibration.statistics import Drift, InputStatistics
from hf_shrink.ops.linalg import damped_cholesky, solve_factored
from hf_shrink.sharding import spread

DAMPINGS = (0.01, 0.1)  # of the correction's second moment, tried on held-out tokens


def corrected(weight: Tensor, statistics: InputStatistics) -> tuple[Tensor, float]:
    """The weight to be rounded in the place of `weight`, and how much of the correction was taken.

    Tokens that were held out decide how much, and with which damping: the correction, and the part of it between 0 and
    1, that brings their outputs nearest to the dense model's.

    Args:
        weight: W, (out, in) float32.
        statistics: with a `drift`; without one the weight comes back as it is.

    Returns:
        V, (out, in) float32, and a number from 0 to 1.
    """
    drift = statistics.drift
    assert drift is None or drift.corrections != 0, "all corrections have been made, and what they came from is gone"
    if drift is None or drift.measured.tokens == 0:
        return weight, 0.0
    # Sums, not means: what solves for the one with the other is the same, and a copy less of the largest matrices.
    moment, held = drift.measured.hessian, drift.held
    missing = (weight @ drift.measured.cross).double()
    gains = weight @ held.cross

    def tried(damping: float) -> tuple[float, float, Tensor]:
        change = solve_factored(damped_cholesky(moment, damping)[0], missing.T).T.float()
        gain = float((gains * change).sum(dtype=torch.float64))
        size = float((change @ held.hessian * change).sum(dtype=torch.float64))
        part = min(max(gain / size, 0.0), 1.0) if size > 0 else 0.0
        return part * (2 * gain - part * size), part, change

    won, taken, change = max(spread(DAMPINGS, tried), key=lambda found: found[0])
    drift.corrected_once()
    return (weight + taken * change, taken) if won > 0 else (weight, 0.0)


def held_out_loss(weight: Tensor, approximation: Tensor, drift: Drift) -> float:
    """How far outputs are from the dense model's on the tokens held out, up to a constant.

    Sum over them of ||W (x + d) - A x||² - ||W d||².

    Args:
        weight, approximation: W and A, (out, in) float32.
    """
    lost = weight - approximation
    own = (lost @ drift.held.hessian * lost).sum(dtype=torch.float64)
    shared = (lost @ drift.held.cross.T * weight).sum(dtype=torch.float64)
    return float(own + 2 * shared)
