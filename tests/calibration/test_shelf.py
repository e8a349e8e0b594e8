"""Tensors put away and given back: the same bytes in the same objects, and no memory meanwhile."""

from __future__ import annotations

import torch

from hf_shrink.calibration.shelf import SMALLEST, Shelf
from hf_shrink.residence import Room


def large(seed: int) -> torch.Tensor:
    return torch.randn(SMALLEST // 4 + seed, generator=torch.Generator().manual_seed(seed))


def test_what_fits_stays_and_the_rest_waits_in_the_file() -> None:
    tensors = [large(seed) for seed in range(4)]
    copies = [tensor.clone() for tensor in tensors]
    views = [tensor.view(-1, 1) for tensor in tensors]
    with Shelf(Room(2 * SMALLEST + 64)) as shelf:
        for owner, tensor in enumerate(tensors):
            shelf.take(owner, [tensor])
            shelf.take(owner, [tensor])  # taking twice is taking once
        empty = [tensor.untyped_storage().nbytes() == 0 for tensor in tensors]
        assert empty == [False, False, True, True]
        assert shelf.in_file == sum(copy.nbytes for copy in copies[2:])
        for owner in (3, 2):
            shelf.give_back(owner)
        shelf.take(2, [tensors[2]])  # a place in the file is used again
        for owner in range(4):
            shelf.give_back(owner)
        assert shelf.in_file == 0
    for tensor, copy, view in zip(tensors, copies, views, strict=True):
        assert torch.equal(tensor, copy)
        assert torch.equal(view[:, 0], copy)


def test_a_tensor_and_its_view_are_put_away_once() -> None:
    for room, in_file in ((0, 4 * SMALLEST), (4 * SMALLEST, 0)):
        tensor = torch.randn(4, SMALLEST // 4)
        copy, flat = tensor.clone(), tensor.view(-1)
        with Shelf(Room(room)) as shelf:
            shelf.take(0, [tensor, flat])
            assert shelf.in_file == in_file
            shelf.give_back(0)
            assert torch.equal(tensor, copy) and torch.equal(flat, copy.view(-1))


def test_views_and_small_tensors_are_left_alone() -> None:
    whole = torch.randn(4, SMALLEST)
    small = torch.randn(8)
    with Shelf(Room(0)) as shelf:
        shelf.take(0, [whole[1], small])
        assert shelf.in_file == 0
        assert whole.untyped_storage().nbytes() == whole.nbytes
