"""Rank correlation of scores with people's."""

from __future__ import annotations

from typing import Any

import datasets

from hf_shrink.evaluation import modules
from hf_shrink.evaluation.bootstrap import Interval, pairs_interval
from hf_shrink.evaluation.ranks import spearman


class RankCorrelation(modules.Module):
    """Spearman's correlation between scores and the right ones: 1 when they order the rows alike."""

    reads = ("score", "reference_score")
    inputs = ("numbers", "the right numbers")
    paper = "Spearman, The Proof and Measurement of Association between Two Things, 1904"

    @classmethod
    def columns(cls) -> list[dict[str, Any]]:
        return [{"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}]

    def interval(self, predictions: list[float], references: list[float], seed: int) -> Interval:
        return pairs_interval(predictions, references, spearman, seed)
