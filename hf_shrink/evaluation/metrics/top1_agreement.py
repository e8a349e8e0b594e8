"""Top-1 agreement: how often both models rank the same output first."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from hf_shrink.evaluation.bootstrap import ratio_interval

DESCRIPTION = """Share of positions where dense and compressed model have the same argmax: 1 for a perfect copy."""
INPUTS = """
Args:
    predictions: list of float, per sequence the number of positions with the same argmax.
    references: list of int, per sequence the number of positions summed over.
    seed: of the bootstrap.

Returns:
    top1_agreement, low, high: the value and its 95% bootstrap interval over sequences (None for fewer than two).
"""


class Top1Agreement(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    """Share of positions with the same argmax."""

    def _info(self) -> evaluate.MetricInfo:
        columns = {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(columns),
        )

    def _compute(self, predictions: list[float], references: list[int], seed: int = 0) -> dict[str, Any]:
        value, low, high = ratio_interval(predictions, references, seed)
        return {"top1_agreement": value, "low": low, "high": high}
