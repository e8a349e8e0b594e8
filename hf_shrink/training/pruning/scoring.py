"""What a score of training is: it sees how the loss answers to masks, batch by batch, and never a module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from hf_shrink.registry import Registry


class TrainingScore(Protocol):
    """Scores units or single weights by the gradients of training. A frozen dataclass; its fields are options.

    What is seen is dL/dm, m a mask on a unit: for units of every sample, for single weights of a whole optimizer step.

    Attributes:
        degree: twice the gradients give 2**degree times what `of` returns.
        returns: whether what is masked may come back. It keeps its weights meanwhile, and its mask a gradient.
    """

    degree: ClassVar[int]
    returns: ClassVar[bool]

    def of(self, gradients: Tensor) -> Tensor:
        """What samples say, float32 (samples, units) to (units,): a sum over samples, so that batches add up."""
        ...

    def updated(self, score: Tensor, found: Tensor) -> Tensor:
        """The running score, float32 (units,), after one more optimizer step, of which `of` said `found`."""
        ...

    def costs(self, score: Tensor) -> Tensor:
        """What it costs to lose each unit, float (units,), at least 0: what the score stands for within one part."""
        ...


@dataclass(frozen=True)
class Averaged:
    """A running mean over optimizer steps.

    Attributes:
        decay: how much of the mean a step leaves; 0.95 looks back over about 20 steps.
    """

    decay: float = 0.95

    returns: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.decay, int | float) or not 0 <= self.decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, not {self.decay!r}")

    def updated(self, score: Tensor, found: Tensor) -> Tensor:
        return score * self.decay + found * (1 - self.decay)

    def costs(self, score: Tensor) -> Tensor:
        return score


SCORES: Registry[TrainingScore] = Registry("score of training", "hf_shrink.training.scores")
