"""Flips: answers that were right and are wrong now, or the other way round."""

from __future__ import annotations

import datasets

from hf_shrink.evaluation import modules
from hf_shrink.evaluation.bootstrap import Interval, ratio_interval


class FlipRate(modules.Module):
    """Share of answers that turned from right to wrong or from wrong to right: 0 for a perfect copy, lower is better.

    Accuracy hides them, because the two directions cancel (arXiv:2407.09141).
    """

    reads = ("correct", "baseline.correct")
    inputs = ("whether the compressed model's answer is right", "whether the dense model's is")
    better = "lower"
    paper = "arXiv:2407.09141"

    @classmethod
    def columns(cls) -> list[dict[str, datasets.Value]]:
        return [{"predictions": datasets.Value("bool"), "references": datasets.Value("bool")}]

    def interval(self, predictions: list[bool], references: list[bool], seed: int) -> Interval:
        flipped = [float(now != before) for now, before in zip(predictions, references, strict=True)]
        return ratio_interval(flipped, [1] * len(flipped), seed)
