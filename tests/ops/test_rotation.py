"""Rotations: orthogonal for every width, Hadamard where one exists, the same for the same seed."""

from __future__ import annotations

import pytest
import torch

from hf_shrink.ops.rotation import random_rotation


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 28, 36, 40, 48, 60, 64, 576, 896, 960, 1536])
def test_hadamard_where_there_is_one(size: int) -> None:
    rotation = random_rotation(size, seed=3)
    identity = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(rotation @ rotation.T, identity, rtol=0, atol=1e-12)
    torch.testing.assert_close(rotation.abs(), torch.full_like(rotation, size**-0.5), rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [3, 7, 54, 92, 100, 130])
def test_a_product_where_there_is_none(size: int) -> None:
    rotation = random_rotation(size, seed=3)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (rotation.abs() > 0).all()  # every channel goes into every other


def test_the_seed_decides() -> None:
    assert torch.equal(random_rotation(54, 1), random_rotation(54, 1))
    assert not torch.equal(random_rotation(48, 1), random_rotation(48, 2))
