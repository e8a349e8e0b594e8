"""Merging experts: channels are matched before weights are averaged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_shrink.ops.merging import aligned, merged


def expert(seed: int, channels: int = 7, width: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gate, up, down = torch.randn(3, channels, width, generator=generator).unbind()
    return {"gate": gate, "up": up, "down": down.T.contiguous()}


def shuffled(weights: dict[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    return {"gate": weights["gate"][order], "up": weights["up"][order], "down": weights["down"][:, order]}


def run(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    gate, up, down = (weights[role].double() for role in ("gate", "up", "down"))
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expert_finds_its_own_order_again(dtype: torch.dtype) -> None:
    kept = {role: weight.to(dtype) for role, weight in expert(0).items()}
    other = shuffled(kept, torch.tensor([3, 0, 6, 1, 5, 2, 4]))
    for role, weight in aligned(other, kept).items():
        assert torch.equal(weight, kept[role]) and weight.dtype == dtype


def test_alignment_does_not_change_what_an_expert_computes() -> None:
    kept, other = expert(0), expert(1)
    x = torch.randn(9, 5, dtype=torch.float64)
    found = aligned(other, kept)
    assert not torch.equal(found["gate"], other["gate"])
    torch.testing.assert_close(run(found, x), run(other, x), rtol=0, atol=1e-12)


def test_the_mean_is_weighted_by_the_shares() -> None:
    kept, first, second = expert(0), expert(1), expert(2)
    found = merged(kept, [(first, 0.25), (second, 0.15)])
    for role, weight in found.items():
        expected = 0.6 * kept[role].double() + 0.25 * aligned(first, kept)[role] + 0.15 * aligned(second, kept)[role]
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-6)
    assert all(torch.equal(weight, kept[role].double()) for role, weight in merged(kept, []).items())
