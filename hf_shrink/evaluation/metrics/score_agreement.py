"""Rank correlation of the compressed model's scores with the dense model's."""

from __future__ import annotations

from typing import Any

import datasets

from hf_shrink.evaluation import modules
from hf_shrink.evaluation.bootstrap import Interval, pairs_interval
from hf_shrink.evaluation.ranks import spearman


class ScoreAgreement(modules.Module):
    """Spearman's correlation between both models' scores: 1 when they order the rows alike."""

    reads = ("score", "baseline.score")
    inputs = ("the compressed model's scores", "the dense model's")
    stands_in = True

    @classmethod
    def columns(cls) -> list[dict[str, Any]]:
        return [{"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}]

    def interval(self, predictions: list[float], references: list[float], seed: int) -> Interval:
        return pairs_interval(predictions, references, spearman, seed)
