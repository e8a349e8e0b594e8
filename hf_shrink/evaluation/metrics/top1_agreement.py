"""Top-1 agreement: how often both models rank the same output first."""

from __future__ import annotations

from hf_shrink.evaluation import modules


class Top1Agreement(modules.Ratio):
    """Share of positions or rows where dense and compressed model choose the same output: 1 for a perfect copy."""

    reads = ("agreeing", "compared")
    inputs = ("per sequence how many positions have the same argmax", "per sequence the number of positions")
