"""Whether both models decide for the same reasons: agreement of input attributions."""

from __future__ import annotations

from hf_shrink.evaluation import modules


class AttributionFidelity(modules.Ratio):
    """Mean over inputs of Spearman's correlation between both models' attributions of one decision to its input.

    The decision is the dense model's; a token's (or patch's) share in it is the size of gradient times input. 1 when
    both models order the parts of the input alike.
    """

    reads = ("attribution", "explained")
    inputs = ("per input the correlation", "1 per input that could be explained, else 0")
    costly = True
    paper = "gradient x input: arXiv:1605.01713; of language models: arXiv:2202.10419"
