"""Who does what: every piece once, nearly even in whatever way it is cut; and one process that needs nobody."""

from __future__ import annotations

import pytest
import torch

from hf_shrink import sharding
from hf_shrink.errors import RecipeError
from hf_shrink.sharding.launching import check_started
from hf_shrink.sharding.share import _owners, owners_of


@pytest.mark.parametrize("size", [2, 3, 8])
def test_pieces_are_shared_out_evenly_in_any_stretch_and_step(size: int) -> None:
    owners = owners_of(24 * size, size)
    assert owners[:-1] == owners_of(24 * size - 1, size)
    for row in range(24):
        assert sorted(owners[row * size : (row + 1) * size]) == list(range(size))
    for step in range(2, 9):
        taken = owners[::step]
        counts = [taken.count(rank) for rank in range(size)]
        assert max(counts) <= len(taken) / size + 2, (step, counts)


def test_dear_work_is_spread_first() -> None:
    assert _owners([1, 9, 1, 1, 5, 1], 2) == [1, 0, 1, 1, 1, 1]
    assert _owners([1.0] * 5, 2) == [0, 1, 0, 1, 0]


def test_one_process_has_everything_and_waits_for_nobody() -> None:
    with sharding.together() as here:
        assert (here.rank, here.size, here.first, here.gather(3)) == (0, 1, True, [3])
        shared = sharding.share(3)
        assert shared.of("abc") == ["a", "b", "c"] and shared.gather([1, 2, 3]) == [1, 2, 3]
        assert shared.totals([2.5, 1]) == [2.5, 1] and shared.among([0, 2]).own == (0, 1)
        sums = torch.ones(2)
        shared.add_up(sums)
        assert sums.tolist() == [1, 1]
        assert sharding.spread([1, 2], lambda x: 2 * x) == [2, 4]
        assert sharding.stretches(5) == [slice(0, 5)]


def test_one_process_in_place_of_several_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    check_started()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(RecipeError, match="add --multi_gpu"):
        check_started()
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_started()
