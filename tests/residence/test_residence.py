"""Tensors in files, and in memory only while they are at work."""

from __future__ import annotations

import copy
import mmap
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hf_shrink.errors import RecipeError
from hf_shrink.residence import Residence, Room, States, bytes_of, map_tensors, rest, twin, write_tensors
from hf_shrink.residence.files import DTYPES
from hf_shrink.residence.pages import PAGEMAP, can_tell, is_own, let_go

SIZE = 64  # of the square matrices: four pages each in float32
pytestmark = pytest.mark.skipif(not can_tell(), reason="this system does not tell a file's pages from others")


def test_the_bytes_are_those_of_safetensors(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.é.{place}": torch.randint(0, 2, (3, place), generator=draw).to(dtype)
        for name, dtype in (("b", torch.float32), ("a", torch.float32), *((str(d), d) for d in DTYPES))
        for place in (0, 1, 5)
    } | {"scalar": torch.tensor(1.0), "turned": torch.rand(4, 3, generator=draw).t()}
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "theirs", metadata={"format": "pt"})
    write_tensors(tmp_path / "ours", tensors, {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    written = []
    write_tensors(tmp_path / "one", tensors, read=lambda name: written.append(name) or tensors[name])
    assert len(written) == len(tensors)
    assert (tmp_path / "one").read_bytes()[-100:] == (tmp_path / "ours").read_bytes()[-100:]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is needed")
def test_the_file_for_which_there_is_no_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*/weights\.partial'"):
        write_tensors(tmp_path / "weights", {"a": torch.zeros(10)})
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: nullcontext(full))
        with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}'"):
            States(Room(0), tmp_path, [torch.zeros(10)])


def mapped(folder: Path, blocks: int = 3) -> tuple[nn.Module, Residence, list[nn.Module]]:
    """A model whose blocks lie in a file, and what looks after it."""
    folder.mkdir()
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE, bias=False)) for _ in range(blocks)]
    model = nn.Sequential(nn.Linear(SIZE, SIZE), *layers)
    save_file(model.state_dict(), folder / "source")
    for name, tensor in map_tensors(folder / "source").items():
        model.get_parameter(name).data = tensor
    residence = Residence(folder, 0, weights=1)
    residence.attach(model, {f"block.{index}": layer for index, layer in enumerate(layers)})
    return model, residence, layers


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"source"}


def test_pages_of_a_file_are_told_from_others(tmp_path: Path) -> None:
    _, _, (block, *_) = mapped(tmp_path / "files")
    weight = block[0].weight.data
    before = weight.clone()
    assert not is_own(weight)
    assert is_own(before)
    let_go(weight)
    assert torch.equal(weight, before)
    weight[SIZE // 2] += 1
    assert is_own(weight)


def test_what_was_changed_is_kept_and_what_was_not_stays_in_the_source(tmp_path: Path) -> None:
    model, residence, blocks = mapped(tmp_path / "files")
    x = torch.randn(2, SIZE)
    with torch.no_grad():
        dense = model(x)
        blocks[1][0].weight[SIZE // 2] += 1  # pages of its own, not of neighbours
        blocks[1][1].weight = nn.Parameter(torch.randn(SIZE, SIZE))
        parameter, expected = blocks[1][0].weight, model(x)
        for block in blocks:
            rest(block)
        assert files(tmp_path / "files") == {"block.1-1.safetensors"}
        assert sorted(load_file(tmp_path / "files" / "block.1-1.safetensors")) == ["0.weight", "1.weight"]
        assert parameter is blocks[1][0].weight
        assert not any(is_own(p) for block in blocks for p in block.parameters())
        assert torch.equal(model(x), expected)
        blocks[1][1].weight.mul_(2)  # what was written once is written again, with what is new
        rest(blocks[1])
        assert sorted(load_file(tmp_path / "files" / "block.1-2.safetensors")) == ["0.weight", "1.weight"]
        assert files(tmp_path / "files") == {"block.1-2.safetensors"}
        assert not torch.equal(model(x), expected)
        residence.finish("block.1", blocks[1], tmp_path / "finished")
        after = model(x)
        again, other, _ = mapped(tmp_path / "again")
        assert torch.equal(again(x), dense)
        other.adopt("block.1", again[2], tmp_path / "finished")
        assert torch.equal(again(x), after)


def present(tensor: torch.Tensor) -> int:
    """How many of a tensor's whole pages are in this process's memory."""
    first, last = -(-tensor.data_ptr() // mmap.PAGESIZE), (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE
    entries = np.fromfile(PAGEMAP, np.uint64, last - first, offset=8 * first)
    return int((entries >> np.uint64(63)).sum())


def test_what_lies_in_no_block_goes_once_it_was_glanced_at(tmp_path: Path) -> None:
    model, residence, blocks = mapped(tmp_path / "files")
    x = torch.randn(2, SIZE)
    with torch.no_grad():
        dense = model(x)
        weight, inside = model[0].weight.data, blocks[-1][0].weight.data
        held = present(inside)
        assert present(weight) >= 3 and held >= 3
        residence.glanced_outside()
        assert present(weight) == 0 and present(inside) == held
        assert torch.equal(model(x), dense)
        weight.mul_(2)
        changed = model(x)
        residence.glanced_outside()  # what was written to it would be lost
        assert torch.equal(model(x), changed) and not torch.equal(changed, dense)


def test_running_never_moves_memory_that_somebody_holds(tmp_path: Path) -> None:
    model, _, blocks = mapped(tmp_path / "files")
    x = torch.randn(2, SIZE)
    with torch.no_grad():
        dense, place = model(x), blocks[0][0].weight.data
        before = place.clone()
        place.zero_()
        tried = model(x)
        assert torch.equal(model(x), tried)
        place.copy_(before)
        assert torch.equal(model(x), dense)
    assert files(tmp_path / "files") == set()


def test_copies_are_not_looked_after(tmp_path: Path) -> None:
    model, residence, blocks = mapped(tmp_path / "files")
    for made in (copy.deepcopy(blocks[0]), twin(blocks[0])):
        assert residence.name_of(made) is None
        rest(made)
        assert all(torch.equal(a, b) for a, b in zip(made.parameters(), blocks[0].parameters(), strict=True))
    assert files(tmp_path / "files") == set()
    shared = twin(blocks[0])
    assert shared[0].weight.data_ptr() == blocks[0][0].weight.data_ptr()
    assert shared[0].weight is not blocks[0][0].weight
    assert len(residence.blocks) == len(model) - 1


@pytest.mark.parametrize("limit", [0, 3 * 4 * 8, 1 << 20])
def test_states_keep_to_their_room(limit: int, tmp_path: Path) -> None:
    room = Room(limit)
    tensors = [torch.randn(2, 4, generator=torch.Generator().manual_seed(n)) for n in range(6)]
    states = States(room, tmp_path, tensors)
    assert room.used == min(limit, 6 * 32)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(states, tensors, strict=True))
        for n in range(len(states)):
            tensors[n] = torch.cat([tensors[n], tensors[n]])
            states[n] = tensors[n]
    assert states.kind(0).shape == tensors[0].shape
    assert room.used <= limit
    assert list(tmp_path.iterdir()) == []
    del states
    assert room.used == 0


def test_amounts_of_memory() -> None:
    assert [bytes_of(x) for x in (5, "5", "1.5 GB", "2GiB", "7mb")] == [5, 5, 1_500_000_000, 2 << 30, 7_000_000]
    for wrong in ("", "4 G", "-1", "much"):
        with pytest.raises(RecipeError, match="amount of memory"):
            bytes_of(wrong)
