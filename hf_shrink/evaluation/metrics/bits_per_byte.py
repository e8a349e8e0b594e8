"""Bits per byte: how far the model would compress the text, whatever its tokenizer is."""

from __future__ import annotations

import math

from hf_shrink.evaluation import modules


class BitsPerByte(modules.Ratio):
    """Negative log-likelihood in bits over the UTF-8 bytes of the predicted text: lower is better."""

    reads = ("nll", "bytes")
    inputs = ("per sequence the summed negative log-likelihood in nats", "per sequence the bytes of the predicted text")
    better = "lower"

    def scale(self, mean: float) -> float:
        return mean / math.log(2)
