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
from hf_shrink.ops.linalg import InverseFactor


def corrected(weight: Tensor, statistics: InputStatistics, inverse: InverseFactor) -> tuple[Tensor, float]:
    """The weight to be rounded in the place of `weight`, and how much of the correction was taken.

    Tokens that were held out decide how much: the part of it, between 0 and 1, that brings their outputs nearest to
    the dense model's.

    Args:
        weight: W, (out, in) float32.
        statistics: with a `drift`; without one the weight comes back as it is.
        inverse: of the mean second moment, damped.

    Returns:
        V, (out, in) float32, and a number from 0 to 1.
    """
    drift = statistics.drift
    if drift is None or drift.tokens == 0:
        return weight, 0.0
    change = inverse.times_inverse(weight @ (drift.cross / drift.tokens))
    gain = (weight @ drift.held_cross * change).sum(dtype=torch.float64)
    size = (change @ drift.held_hessian * change).sum(dtype=torch.float64)
    part = float((gain / size).clamp(0, 1)) if size > 0 else 0.0
    return weight + part * change, part


def held_out_loss(weight: Tensor, approximation: Tensor, drift: Drift) -> float:
    """How far outputs are from the dense model's on the tokens held out, up to a constant.

    Sum over them of ||W (x + d) - A x||² - ||W d||².

    Args:
        weight, approximation: W and A, (out, in) float32.
    """
    lost = weight - approximation
    own = (lost @ drift.held_hessian * lost).sum(dtype=torch.float64)
    shared = (lost @ drift.held_cross.T * weight).sum(dtype=torch.float64)
    return float(own + 2 * shared)
