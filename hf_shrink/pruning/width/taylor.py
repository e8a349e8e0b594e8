"""Taylor: by how much the loss would change with a unit, to first order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_shrink.pruning.base import WIDTH, UnitView
from hf_shrink.pruning.gradient_scores import GradientScore, needed


@WIDTH.register("taylor")
@dataclass(frozen=True)
class Taylor(GradientScore):
    """Mean over samples of |dL/dm|, m a mask on the unit (Michel et al., arXiv 1905.10650; for channels Molchanov et
    al., arXiv 1906.10771).

    dL/dm is the sum of w * dL/dw over the weights that read the unit, the criterion of LLM-Pruner (arXiv 2305.11627)
    for a group; its absolute value is taken sample by sample, since a trained model's mean gradient says little.
    """

    needs_statistics: ClassVar[bool] = False

    def score(self, view: UnitView) -> Tensor:
        return needed(view, "taylor").abs().mean(0)
