"""Magnitude: a unit matters as much as its weights are large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_shrink.pruning.base import WIDTH, UnitView


@WIDTH.register("magnitude")
@dataclass(frozen=True)
class Magnitude:
    """Squared L2 norm of all weights of a unit: the group criterion of DepGraph (Fang et al., arXiv 2301.12900).

    Needs no data. A baseline: on language models it is far behind methods that look at activations.
    """

    needs_statistics: ClassVar[bool] = False

    def score(self, view: UnitView) -> Tensor:
        score = view.columns.square().sum(dim=(0, 2))
        for rows in view.rows:
            score = score + rows.square().sum(dim=(1, 2))
        return torch.as_tensor(score)
