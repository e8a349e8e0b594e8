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
    the attention or the MLP on samples, and takes the mean magnitude for m). Grids that span the weights' ranges, on
    some rows, say where to begin; from there alpha goes step by step to where searched grids, which clip outliers, have
    the least error on all rows. alpha = 0 is tried as well, so that the error of rounding to nearest never rises.

    Attributes:
        grid: how many alphas above 0 there are.
        rows: rows of each weight that say where to begin.
    """

    grid: int = 10
    rows: int = 128

    def __post_init__(self) -> None:
        for name in ("grid", "rows"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {getattr(self, name)!r}")

    def scales(self, case: ScalingCase) -> Tensor:
        """See `Scaling.scales`. The geometric mean of the largest and the smallest scale is 1."""
        size = case.unit_mean(case.statistics.mean.diagonal()).sqrt()
        live = size > 0
        if not live.any():
            return torch.ones_like(size)
        logs = size.clamp_min(1e-30).log()
        logs = torch.where(live, logs - (logs[live].max() + logs[live].min()) / 2, 0.0)
        scales = [(logs * (step / self.grid)).exp() for step in range(self.grid + 1)]
        ranked = [case.error(scale, self.rows, clip=False) for scale in scales]
        errors = {0: case.error(scales[0])}
        at, following = -1, ranked.index(min(ranked))
        while at != following:
            at = following
            for step in (at - 1, at, at + 1):
                if 0 <= step <= self.grid and step not in errors:
                    errors[step] = case.error(scales[step])
            following = min((at, at - 1, at + 1), key=lambda step: errors.get(step, float("inf")))
        return scales[min(errors, key=lambda step: errors[step])]
