"""Greedy by KL divergence: try every block, remove the one whose absence changes the predictions least, repeat."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hf_shrink.pruning.base import DEPTH, DepthProblem, Removal


@DEPTH.register("kl_greedy")
@dataclass(frozen=True)
class KlGreedy:
    """SLEB's loop (Song et al., arXiv 2402.09025) with KL(dense || pruned) as its measure instead of perplexity.

    Attributes:
        tokens: calibration tokens that a measurement runs over; more is slower and less noisy.
        candidates: try only this many blocks each round, those of the lowest block influence; None: all.
    """

    tokens: int = 2048
    candidates: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("tokens", self.tokens), ("candidates", self.candidates)):
            if not (value is None and name == "candidates") and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")

    def removals(self, problem: DepthProblem) -> Iterator[Removal]:
        removed: list[int] = []
        while tried := self._shortlist(problem, removed):
            divergences = problem.divergences(removed, tried, self.tokens)
            best = min(tried, key=lambda block: (divergences[block], block))
            removed.append(best)
            yield Removal(best, divergences[best])

    def _shortlist(self, problem: DepthProblem, removed: list[int]) -> list[int]:
        blocks = list(problem.candidates(removed))
        if self.candidates is None or len(blocks) <= self.candidates:
            return blocks
        influences = problem.influences(removed, self.tokens)
        return sorted(sorted(blocks, key=lambda block: (influences[block], block))[: self.candidates])
