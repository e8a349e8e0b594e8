"""Refit what reads the kept units, so that it makes up for the ones that are gone."""

from __future__ import annotations

from torch import Tensor

from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.ops.linalg import least_squares_refit

DAMPING = 0.01  # of the mean second moment: pulls towards the weights as they are where the data says little


def refit_columns(weight: Tensor, statistics: InputStatistics, kept: Tensor, damping: float = DAMPING) -> Tensor:
    """The weight of `output` or `down` on its kept inputs that best reproduces its outputs on all of them.

    Args:
        weight: (out, in) float32, before anything is cut.
        statistics: of its inputs, taken before anything is cut.
        kept: int64 (k,), ascending positions of the kept inputs.

    Returns:
        float32 (out, k).

    Raises:
        CalibrationError: the statistics are not finite, or no damping makes them invertible.
    """
    return least_squares_refit(weight.float(), statistics.mean, kept, damping)
