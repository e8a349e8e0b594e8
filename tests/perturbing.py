"""Models that are a little off, and made-up tokens to run them on."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from tiny import VOCABULARY

Model = TypeVar("Model", bound=torch.nn.Module)


def perturbed(model: Model, size: float = 0.05) -> Model:
    """A copy with noise of this standard deviation on every parameter."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return other


def windows(rows: int = 3, length: int = 20, seed: int = 0) -> torch.Tensor:
    """Token ids (rows, length), none of them special."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
