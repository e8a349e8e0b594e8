"""Perplexity: e to the mean negative log-likelihood of a token."""

from __future__ import annotations

import math
from typing import Any

import datasets
import evaluate

from hf_shrink.evaluation.bootstrap import ratio_interval

DESCRIPTION = (
    """exp(sum of negative log-likelihoods / number of predicted tokens): token perplexity, lower is better."""
)
INPUTS = """
Args:
    predictions: list of float, per sequence the summed negative log-likelihood in nats.
    references: list of int, per sequence the number of positions summed over.
    seed: of the bootstrap.

Returns:
    perplexity, low, high: the value and its 95% bootstrap interval over sequences (None for fewer than two).
"""


class Perplexity(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    """exp(total negative log-likelihood / predicted tokens). Token perplexity: compare only with the same tokenizer."""

    def _info(self) -> evaluate.MetricInfo:
        columns = {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(columns),
        )

    def _compute(self, predictions: list[float], references: list[int], seed: int = 0) -> dict[str, Any]:
        interval = ratio_interval(predictions, references, seed)
        # exp is monotonic, so the interval of the mean maps onto the interval of the perplexity.
        value, low, high = (None if mean is None else _exp(mean) for mean in interval)
        return {"perplexity": value, "low": low, "high": high}


def _exp(mean: float) -> float:
    """e to `mean`; infinite beyond what a float holds (a mean of 709 nats a token)."""
    return math.exp(mean) if mean < 709 else math.inf
