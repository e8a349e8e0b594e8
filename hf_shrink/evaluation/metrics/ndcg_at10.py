"""Normalised discounted cumulative gain of the first ten found."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np

from hf_shrink.evaluation import modules
from hf_shrink.evaluation.bootstrap import Interval, ratio_interval

FIRST = 10


class NdcgAt10(modules.Module):
    """Mean over queries of the discounted gain of the ten first found over that of the best order; 1 is perfect."""

    reads = ("gains", "ideal_gains")
    inputs = ("per query the gains of what was found, first first", "per query the gains of all there is to find")
    paper = "Jarvelin and Kekalainen, Cumulated gain-based evaluation of IR techniques, 2002"

    @classmethod
    def columns(cls) -> list[dict[str, Any]]:
        gains = datasets.Sequence(datasets.Value("float64"))
        return [{"predictions": gains, "references": gains}]

    def interval(self, predictions: list[list[float]], references: list[list[float]], seed: int) -> Interval:
        best = [_discounted(sorted(all_of_them, reverse=True)) for all_of_them in references]
        shares = [_discounted(gains) / most if most else 0.0 for gains, most in zip(predictions, best, strict=True)]
        return ratio_interval(shares, [int(most > 0) for most in best], seed)


def _discounted(gains: list[float]) -> float:
    first = np.asarray(gains[:FIRST], dtype=np.float64)
    return float((first / np.log2(np.arange(2, len(first) + 2))).sum())
