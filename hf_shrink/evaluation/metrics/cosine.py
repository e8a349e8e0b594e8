"""Cosine agreement of hidden states, for models that put out no distribution."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from hf_shrink.evaluation.bootstrap import ratio_interval

DESCRIPTION = """Mean over positions of the cosine between the dense and the compressed model's last hidden state."""
INPUTS = """
Args:
    predictions: list of float, per sequence the summed cosines.
    references: list of int, per sequence the number of positions summed over.
    seed: of the bootstrap.

Returns:
    cosine, low, high: the value and its 95% bootstrap interval over sequences (None for fewer than two).
"""


class Cosine(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    """Mean cosine of the last hidden states: 1 for a perfect copy."""

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
        return {"cosine": value, "low": low, "high": high}
