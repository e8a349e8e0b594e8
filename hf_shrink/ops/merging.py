"""Merge experts: order their channels alike first, then take a weighted mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Weights = Mapping[str, Tensor]  # gate and up (channels, width), down (width, channels)


def aligned(weights: Weights, like: Weights) -> dict[str, Tensor]:
    """The weights of an expert with its channels in the order that fits another expert best.

    An expert computes the same whatever the order of its channels. The chosen one has the largest sum of products of
    matched channels' weights (Ainsworth et al., arXiv 2209.04836, for one layer).

    Args:
        weights, like: any float dtype.

    Returns:
        Copies, in the dtype given.
    """
    likeness = like["gate"].double() @ weights["gate"].double().T
    likeness += like["up"].double() @ weights["up"].double().T
    likeness += like["down"].double().T @ weights["down"].double()
    _, order = linear_sum_assignment(likeness.cpu().numpy(), maximize=True)
    order = torch.from_numpy(order).to(likeness.device)
    return {"gate": weights["gate"][order], "up": weights["up"][order], "down": weights["down"][:, order]}


def merged(kept: Weights, others: Sequence[tuple[Weights, float]]) -> dict[str, Tensor]:
    """A kept expert with others merged into it (M-SMoE, Li et al., arXiv 2310.01334).

    Args:
        kept: any float dtype.
        others: the experts that go, each with its share; the kept one has what the shares leave of 1.

    Returns:
        float64: the mean of all, channels of the others in the kept one's order.
    """
    rest = 1.0 - sum(share for _, share in others)
    total = {role: weight.double() * rest for role, weight in kept.items()}
    for other, share in others:
        for role, weight in aligned(other, kept).items():
            total[role] += weight.double() * share
    return total
