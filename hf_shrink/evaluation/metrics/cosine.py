"""Cosine agreement of hidden states or embeddings, for models that put out no distribution."""

from __future__ import annotations

from hf_shrink.evaluation import modules


class Cosine(modules.Ratio):
    """Mean cosine between both models' last hidden states or embeddings: 1 for a perfect copy."""

    reads = ("cosine", "compared")
    inputs = ("per sequence the summed cosines", "per sequence the number of positions")
    stands_in = True
