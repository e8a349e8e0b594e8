"""Statistics for a weight that is multiplied by and looked up as well: an output head tied to its embedding."""

from __future__ import annotations

from hf_shrink.calibration.statistics import InputStatistics

EVENLY = 0.1  # of the mean second moment, in every direction; see .github/DESIGN.md for what others give


def also_looked_up(statistics: InputStatistics) -> InputStatistics:
    """Those of the head's inputs, as if its rows were also used as they are."""
    return statistics.evened(EVENLY)
