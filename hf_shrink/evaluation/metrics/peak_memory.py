"""Memory that a model takes."""

from __future__ import annotations

from hf_shrink.evaluation import modules


class PeakMemory(modules.Ratio):
    """Most resident bytes of a process that loads the checkpoint and runs it once, beyond its libraries'.

    As `hf_shrink.evaluation.memory` counts them.
    """

    reads = ("peak_bytes", "processes")
    inputs = ("bytes of each process", "1 per process")
    better = "lower"
    costly = True
