"""Weights and statistics that the tests of the quantization methods share."""

from __future__ import annotations

import torch

from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.plan import Scheme

SCHEMES = [
    Scheme(4, True, "group", 16),
    Scheme(2, False, "group", 16),
    Scheme(3, True, "channel", None),
    Scheme(3, False, "channel", None),
    Scheme(8, True, "tensor", None),
    Scheme(4, False, "tensor", None),
]


def statistics_of(x: torch.Tensor) -> InputStatistics:
    x = x.float()
    return InputStatistics(x.T @ x, len(x))


def case(out: int = 20, channels: int = 48, tokens: int = 400, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (out, channels) and correlated inputs (tokens, channels) of unequal sizes, as in real models."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=generator) + torch.eye(channels)
    mix *= torch.logspace(0.5, -0.5, channels)[torch.randperm(channels, generator=generator)]
    x = torch.randn(tokens, channels, generator=generator) @ mix
    return torch.randn(out, channels, generator=generator), x
