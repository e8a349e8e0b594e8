"""KL divergence of the compressed model's distribution from the dense one's."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from hf_shrink.evaluation.bootstrap import ratio_interval

DESCRIPTION = """Mean over positions of KL(dense || compressed) in nats: 0 for a perfect copy, lower is better."""
INPUTS = """
Args:
    predictions: list of float, per sequence the summed KL(dense || compressed) in nats.
    references: list of int, per sequence the number of positions summed over.
    seed: of the bootstrap.

Returns:
    kl_divergence, low, high: the value and its 95% bootstrap interval over sequences (None for fewer than two).
"""


class KLDivergence(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    """Mean KL(dense || compressed) in nats."""

    def _info(self) -> evaluate.MetricInfo:
        columns = {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="Kullback and Leibler, On Information and Sufficiency, 1951",
            inputs_description=INPUTS,
            features=datasets.Features(columns),
        )

    def _compute(self, predictions: list[float], references: list[int], seed: int = 0) -> dict[str, Any]:
        value, low, high = ratio_interval(predictions, references, seed)
        return {"kl_divergence": value, "low": low, "high": high}
