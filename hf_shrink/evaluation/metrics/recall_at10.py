"""Share of what there is to find that is among the first ten."""

from __future__ import annotations

from typing import Any

import datasets

from hf_shrink.evaluation import modules
from hf_shrink.evaluation.bootstrap import Interval, ratio_interval

FIRST = 10


class RecallAt10(modules.Module):
    """Mean over queries of the share of relevant documents among the ten first found."""

    reads = ("gains", "ideal_gains")
    inputs = ("per query the gains of what was found, first first", "per query the gains of all there is to find")

    @classmethod
    def columns(cls) -> list[dict[str, Any]]:
        gains = datasets.Sequence(datasets.Value("float64"))
        return [{"predictions": gains, "references": gains}]

    def interval(self, predictions: list[list[float]], references: list[list[float]], seed: int) -> Interval:
        wanted = [sum(gain > 0 for gain in gains) for gains in references]
        found = [sum(gain > 0 for gain in gains[:FIRST]) for gains in predictions]
        shares = [
            number / all_of_them if all_of_them else 0.0 for number, all_of_them in zip(found, wanted, strict=True)
        ]
        return ratio_interval(shares, [int(number > 0) for number in wanted], seed)
