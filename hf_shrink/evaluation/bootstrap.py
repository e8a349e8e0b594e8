"""A ratio of sums over sequences, with its bootstrap interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hf_shrink.errors import CalibrationError

RESAMPLES = 2000
Interval = tuple[float, float | None, float | None]


def ratio_interval(sums: Sequence[float], counts: Sequence[int], seed: int = 0) -> Interval:
    """sum(sums) / sum(counts) and its 95% percentile interval, resampling whole sequences (Efron 1979).

    Tokens of one sequence depend on each other, so the sequence is what is resampled, never the token.

    Args:
        sums: one total per sequence.
        counts: over how many positions each total runs; sequences with none are left out.
        seed: of the resampling.

    Returns:
        (value, low, high); low and high are None for fewer than two sequences, where nothing can be resampled.

    Raises:
        CalibrationError: there are no positions at all, or a total is NaN or infinite.
    """
    total = np.asarray(sums, dtype=np.float64)
    count = np.asarray(counts, dtype=np.float64)
    if not np.isfinite(total).all():
        bad = int(np.flatnonzero(~np.isfinite(total))[0])
        raise CalibrationError(
            f"the outputs on evaluation sequence {bad} are NaN or infinite, so no metric means anything; check the "
            "model with one forward pass, and the note about damping or precision in its report"
        )
    total, count = total[count > 0], count[count > 0]
    if len(count) == 0:
        raise CalibrationError("the evaluation data has no position to score; give longer or unpadded sequences")
    value = float(total.sum() / count.sum())
    if len(count) < 2:
        return value, None, None
    generator = np.random.default_rng(seed)
    even = np.full(len(count), 1 / len(count))
    ratios = np.empty(RESAMPLES)
    step = max(1, 4_000_000 // len(count))  # draws of at most 32 MB at a time
    for start in range(0, RESAMPLES, step):
        draws = generator.multinomial(len(count), even, size=min(step, RESAMPLES - start))
        ratios[start : start + step] = (draws @ total) / (draws @ count)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return value, float(low), float(high)
