"""AWQ (Lin et al., arXiv 2306.00978): weights that meet large inputs are scaled up, and so lose less by rounding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_shrink.transforms.base import TRANSFORMS, Scaling, ScalingCase


@TRANSFORMS.register("awq")
@dataclass(frozen=True)
class AWQ(Scaling):
    """Scales m^alpha, m the root mean square of a channel's input, for the alpha in [0, 1] of the least output error.

    The error is that of all matrices that read the input, rounded to nearest, on their second moments (the paper runs
    the attention or the MLP on samples, and takes the mean magnitude for m). alpha = 0 is among those tried, so that
    the error of rounding to nearest never rises.

    Attributes:
        grid: how many alphas above 0 are tried.
        rows: rows of each weight that the search looks at; its choice is then checked on all of them.
    """

    grid: int = 20
    rows: int = 256

    def __post_init__(self) -> None:
        for name in ("grid", "rows"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {getattr(self, name)!r}")

    def scales(self, case: ScalingCase) -> Tensor:
        """See `Scaling.scales`. The geometric mean of the largest and the smallest scale is 1."""
        size = case.unit_mean(case.statistics.mean.diagonal()).sqrt()
        live = size > 0
        none = torch.ones_like(size)
        if not live.any():
            return none
        logs = size.clamp_min(1e-30).log()
        logs = torch.where(live, logs - (logs[live].max() + logs[live].min()) / 2, 0.0)
        best, least = none, case.error(none, self.rows)
        for step in range(1, self.grid + 1):
            scale = (logs * (step / self.grid)).exp()
            error = case.error(scale, self.rows)
            if error < least:
                best, least = scale, error
        searched_all = all(len(weight) <= self.rows for weight in case.weights)
        return best if searched_all or best is none or case.error(best) < case.error(none) else none
