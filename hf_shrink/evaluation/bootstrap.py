"""A figure from sums over sequences, with its bootstrap interval."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hf_shrink.errors import CalibrationError

RESAMPLES = 2000
_AT_ONCE = 4_000_000  # draws of at most 32 MB at a time
Interval = tuple[float, float | None, float | None]
Floats: TypeAlias = NDArray[np.float64]


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
    kept = count > 0
    if not kept.any():
        raise CalibrationError("the evaluation data has no position to score; give longer or unpadded sequences")
    return sums_interval(np.stack([total[kept], count[kept]], 1), lambda both: both[..., 0] / both[..., 1], seed)


def sums_interval(contributions: Floats, statistic: Callable[[Floats], Any], seed: int = 0) -> Interval:
    """A figure that depends on the data through sums only, and its interval.

    Args:
        contributions: (sequences, k), what each adds to the sums.
        statistic: from sums (..., k) to figures (...).
        seed: of the resampling.

    Returns:
        As `ratio_interval`.
    """
    value = float(statistic(contributions.sum(0)))
    if len(contributions) < 2:
        return value, None, None
    even = np.full(len(contributions), 1 / len(contributions))
    generator = np.random.default_rng(seed)
    figures = np.empty(RESAMPLES)
    for start, size in _pieces(len(contributions)):
        draws = generator.multinomial(len(contributions), even, size=size)
        figures[start : start + size] = statistic(draws @ contributions)
    return value, *_middle(figures)


def pairs_interval(
    first: Sequence[float], second: Sequence[float], statistic: Callable[[Floats, Floats], Any], seed: int = 0
) -> Interval:
    """A figure of two columns that does not come from sums, such as a rank correlation, resampling their rows.

    Args:
        first, second: one number a row each.
        statistic: from two arrays (..., rows) to figures (...); NaN where it is not defined.
        seed: of the resampling.

    Returns:
        As `ratio_interval`; resamples on which the figure is not defined are left out.
    """
    columns = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    value, rows = float(statistic(*columns)), len(columns[0])
    if rows < 3:
        return value, None, None
    generator = np.random.default_rng(seed)
    figures = np.empty(RESAMPLES)
    for start, size in _pieces(rows):
        drawn = generator.integers(rows, size=(size, rows))
        figures[start : start + size] = statistic(columns[0][drawn], columns[1][drawn])
    defined = figures[np.isfinite(figures)]
    return (value, *_middle(defined)) if len(defined) else (value, None, None)


def _pieces(rows: int) -> Iterator[tuple[int, int]]:
    step = max(1, _AT_ONCE // rows)
    for start in range(0, RESAMPLES, step):
        yield start, min(step, RESAMPLES - start)


def _middle(figures: Floats) -> tuple[float, float]:
    low, high = np.quantile(figures, (0.025, 0.975))
    return float(low), float(high)
