"""Perplexity: e to the mean negative log-likelihood of a token."""

from __future__ import annotations

import math

from hf_shrink.evaluation import modules


class Perplexity(modules.Ratio):
    """exp(sum of negative log-likelihoods / predicted tokens): lower is better.

    It counts tokens: compare only with the same tokenizer, context and stride.
    """

    reads = ("nll", "predicted")
    inputs = ("per sequence the summed negative log-likelihood in nats", "per sequence the number of predicted tokens")
    better = "lower"

    def scale(self, mean: float) -> float:
        return math.exp(mean) if mean < 709 else math.inf  # 709 nats a token is what a float holds
