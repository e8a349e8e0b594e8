"""Whether both models look at the same places: agreement of attention maps."""

from __future__ import annotations

from hf_shrink.evaluation import modules


class AttentionFidelity(modules.Ratio):
    """Mean over positions of 1 - total variation between both models' attention: 1 for the same maps.

    Maps are averaged over heads and blocks, so that models with different numbers of them can be compared.
    """

    reads = ("attention", "attended")
    inputs = ("per input the summed agreement of positions", "per input the number of positions")
    costly = True
