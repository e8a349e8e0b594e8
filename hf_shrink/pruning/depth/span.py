"""A contiguous span of blocks: the one that turns the residual stream least."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from hf_shrink.pruning.base import DEPTH, DepthProblem, Removal
from hf_shrink.pruning.options import check_counts


@DEPTH.register("span")
@dataclass(frozen=True)
class Span:
    """Gromov et al., arXiv 2403.17887: the neighbouring blocks with the smallest angle between input and output.

    One forward pass, and one gap, whose work the refit after it (arXiv 2505.02819) gives to the blocks around it.

    Attributes:
        tokens: calibration tokens over which angles are averaged.
    """

    tokens: int = 8192
    takes_parts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_counts(self, "tokens")

    def removals(self, problem: DepthProblem) -> Iterator[Removal]:
        spans = [span for start in range(len(problem.labels)) if (span := _from(problem, start)) is not None]
        if not spans:
            return
        angles = problem.angles(spans, self.tokens)
        best = min(range(len(spans)), key=lambda place: (angles[place], place))
        for block in spans[best]:
            yield Removal(block, angles[best])


def _from(problem: DepthProblem, start: int) -> list[int] | None:
    """The span from a block on that reaches the goal; None where its stack ends before."""
    span: list[int] = []
    for block in range(start, len(problem.labels)):
        left = problem.candidates(span)
        if not left:
            return span
        if block not in left or problem.stacks[block] != problem.stacks[start]:
            return None
        span.append(block)
    return None if problem.candidates(span) else span
