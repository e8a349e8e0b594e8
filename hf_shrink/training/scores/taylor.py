"""Taylor: by how much the loss would change, to first order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_shrink.training.pruning.scoring import SCORES, Averaged


@SCORES.register("taylor")
@dataclass(frozen=True)
class Taylor(Averaged):
    """|dL/dm|, as `pruning/width/taylor.py` (Michel et al., arXiv 1905.10650), on the samples of training."""

    degree: ClassVar[int] = 1

    def of(self, gradients: Tensor) -> Tensor:
        return gradients.abs().sum(0)
