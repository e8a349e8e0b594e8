"""SmoothQuant (Xiao et al., arXiv 2211.10438): move the range of outlying activations into the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_shrink.errors import CalibrationError
from hf_shrink.transforms.base import TRANSFORMS, Scaling, ScalingCase


@TRANSFORMS.register("smooth")
@dataclass(frozen=True)
class Smooth(Scaling):
    """Scales max|x|^alpha / max|w|^(1 - alpha), by channel: for schemes that round activations too, such as W8A8.

    Attributes:
        alpha: how much of the difficulty goes from the activations to the weights, 0 to 1.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.alpha, int | float) or not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be between 0 and 1, not {self.alpha!r}")

    def scales(self, case: ScalingCase) -> Tensor:
        """See `Scaling.scales`. A channel that is always zero, or that no weight reads, keeps scale 1."""
        if case.statistics.largest is None:
            raise CalibrationError("smooth needs the inputs' largest values, which these statistics do not have")
        inputs = case.unit_largest(case.statistics.largest)
        weights = case.unit_largest(torch.stack([w.abs().amax(0) for w in case.weights]).amax(0))
        used = (inputs > 0) & (weights > 0)
        scale = inputs.pow(self.alpha) / weights.clamp_min(1e-30).pow(1 - self.alpha)
        return torch.where(used, scale.clamp(1e-5, 1e5), 1.0)
