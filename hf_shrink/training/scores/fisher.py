"""Fisher: by how much the loss would change, to second order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_shrink.training.pruning.scoring import SCORES, Averaged


@SCORES.register("fisher")
@dataclass(frozen=True)
class Fisher(Averaged):
    """(dL/dm)², as `pruning/width/fisher.py` (Kwon et al., arXiv 2204.09656), on the samples of training."""

    degree: ClassVar[int] = 2

    def of(self, gradients: Tensor) -> Tensor:
        return gradients.square().sum(0)
