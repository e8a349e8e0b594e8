"""Seconds of a forward pass."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np

from hf_shrink.evaluation import modules
from hf_shrink.evaluation.bootstrap import Interval, pairs_interval


class Latency(modules.Module):
    """Median wall seconds of a forward pass over one input; both models in turn. Lower is better."""

    reads = ("seconds", "passes")
    inputs = ("seconds of each timed run", "how many passes each run made")
    better = "lower"
    costly = True

    @classmethod
    def columns(cls) -> list[dict[str, Any]]:
        return [{"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}]

    def interval(self, predictions: list[float], references: list[float], seed: int) -> Interval:
        return pairs_interval(predictions, references, lambda spent, passes: np.median(spent / passes, axis=-1), seed)
