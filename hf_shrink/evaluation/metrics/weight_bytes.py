"""Bytes of a model's weights in memory."""

from __future__ import annotations

from hf_shrink.evaluation import modules


class WeightBytes(modules.Ratio):
    """Bytes of all parameters and saved buffers, tied ones once: lower is better."""

    reads = ("weight_bytes", "models")
    inputs = ("bytes", "1 per model")
    better = "lower"
    costly = True
