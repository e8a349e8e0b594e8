"""Several processes on one run: who does what, and how it comes together. One process is the simple case of it.

Whatever is called here with several processes is called by all of them, in the same order.
"""

from hf_shrink.sharding.launching import check_started, heeding_the_launcher, launched_first
from hf_shrink.sharding.ranks import Ended, ProcessLost, Ranks, alone, ranks, together
from hf_shrink.sharding.share import Share, share, spread, stretches, whole

__all__ = [
    "Ended",
    "ProcessLost",
    "Ranks",
    "Share",
    "alone",
    "check_started",
    "heeding_the_launcher",
    "launched_first",
    "ranks",
    "share",
    "spread",
    "stretches",
    "together",
    "whole",
]
