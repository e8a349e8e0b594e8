"""Wanda for units: how much of a block's output passes through each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_shrink.errors import CalibrationError
from hf_shrink.pruning.base import WIDTH, UnitView


@WIDTH.register("wanda")
@dataclass(frozen=True)
class Wanda:
    """Weights times activations (Sun et al., arXiv 2306.11695), for whole units as in Wanda-sp (An et al., 2312.11983).

    score = sum over the unit's inputs j of ||W[:, j]||^2 * mean(x_j^2): the squared norm of the columns that read the
    unit, each weighted by the root mean square of its input. It is the output energy that is lost with the unit if the
    inputs are uncorrelated.
    """

    needs_statistics: ClassVar[bool] = True

    def score(self, view: UnitView) -> Tensor:
        if view.second_moment is None:
            raise CalibrationError("wanda needs statistics of the inputs; pass calibration data")
        mean_square = view.second_moment.diagonal().view(view.columns.shape[1:])
        return (view.columns.square().sum(0) * mean_square).sum(-1)
