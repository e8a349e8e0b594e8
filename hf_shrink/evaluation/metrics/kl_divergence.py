"""KL divergence of the compressed model's distribution from the dense one's."""

from __future__ import annotations

from hf_shrink.evaluation import modules


class KLDivergence(modules.Ratio):
    """Mean over positions of KL(dense || compressed) in nats: 0 for a perfect copy, lower is better."""

    reads = ("divergence", "compared")
    inputs = ("per sequence the summed KL(dense || compressed) in nats", "per sequence the number of positions")
    better = "lower"
    paper = "Kullback and Leibler, On Information and Sufficiency, 1951"
