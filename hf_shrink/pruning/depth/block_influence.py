"""Block influence: a block that hardly turns its input can go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from hf_shrink.pruning.base import DEPTH, DepthProblem, Removal


@DEPTH.register("block_influence")
@dataclass(frozen=True)
class BlockInfluence:
    """ShortGPT (Men et al., arXiv 2403.03853): remove the blocks with the lowest 1 - cos(input, output), all at once.

    One forward pass over the calibration data, however many blocks go.
    """

    takes_parts: ClassVar[bool] = False

    def removals(self, problem: DepthProblem) -> Iterator[Removal]:
        influences = problem.influences([])
        removed: list[int] = []
        for block in sorted(influences, key=lambda b: (influences[b], b)):
            if block in problem.candidates(removed):
                removed.append(block)
                yield Removal(block, influences[block])
