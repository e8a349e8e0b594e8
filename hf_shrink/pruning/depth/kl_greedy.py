"""Greedy by KL divergence: try what could go, remove what changes the predictions least, repeat."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from hf_shrink.pruning.base import DEPTH, DepthProblem, Look, Removal
from hf_shrink.pruning.greedy import cheapest_first
from hf_shrink.pruning.options import check_counts


@DEPTH.register("kl_greedy")
@dataclass(frozen=True)
class KlGreedy:
    """SLEB's loop (Song et al., arXiv 2402.09025) with KL(dense || pruned) as its measure instead of perplexity.

    Of items of different sizes the one goes that costs least for its size. What runs in front of a candidate is
    computed once a round for all of them.

    Attributes:
        tokens: calibration tokens that a measurement runs over; more is slower and less noisy.
        predictions: how many of their predictions are compared.
        candidates: after the first round, try only this many, those that cost least when they were last tried; None:
            all.
    """

    tokens: int = 2048
    predictions: int = 512
    candidates: int | None = 10
    takes_parts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_counts(self, "tokens", "predictions", "candidates", optional=("candidates",))

    def removals(self, problem: DepthProblem) -> Iterator[Removal]:
        return cheapest_first(problem, Look(self.tokens, self.predictions, fast=True), self.candidates)
