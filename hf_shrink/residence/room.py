"""A limit on what may stay in memory, and hidden states that keep to it."""

from __future__ import annotations

import ctypes
import os
import re
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from hf_shrink.errors import RecipeError
from hf_shrink.residence.files import writing

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def bytes_of(amount: int | str) -> int:
    """Bytes from a number of them, or from such as "500MB", "4GB" or "4GiB". Raises RecipeError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(amount))
    if found is None or found[2].upper() not in UNITS:
        raise RecipeError(f"an amount of memory is a number of bytes, or such as 500MB or 4GB, not {amount!r}")
    return int(float(found[1]) * UNITS[found[2].upper()])


class Room:
    """Bytes that several parties may hold in memory together."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    def take(self, size: int) -> bool:
        """Whether so many bytes more may stay; they count from then on."""
        if self.used + size > self.limit:
            return False
        self.used += size
        return True

    def give(self, size: int) -> None:
        """So many bytes are no longer held."""
        self.used -= size


class States:
    """Hidden states, one tensor a batch: those that find no room in memory lie in an unnamed file.

    Read and written like a list. What is read from the file is a tensor of its own, not kept here.

    Args:
        room: None: all of them stay in memory.
        folder: of the file; None: the system's for temporary files.
    """

    def __init__(self, room: Room | None = None, folder: Path | None = None, tensors: Iterable[Tensor] = ()) -> None:
        self._room, self._folder = room, folder
        self._here: dict[int, Tensor] = {}
        self._kinds: list[tuple[torch.dtype, torch.Size]] = []
        self._places: dict[int, tuple[int, int]] = {}  # where in the file, and the bytes that there are there
        self._end = 0
        self._file: int | None = None
        self._held: dict[int, int] = {}
        if room is not None:
            weakref.finalize(self, _give_all, room, self._held)
        for tensor in tensors:
            self.append(tensor)

    def __len__(self) -> int:
        return len(self._kinds)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[batch] for batch in range(len(self)))

    def __getitem__(self, batch: int) -> Tensor:
        if batch in self._here:
            return self._here[batch]
        dtype, shape = self._kinds[batch]
        tensor = torch.empty(shape, dtype=dtype)
        self._through(os.preadv, batch, tensor)
        return tensor

    def __setitem__(self, batch: int, tensor: Tensor) -> None:
        self._kinds[batch] = tensor.dtype, tensor.shape
        self._here.pop(batch, None)
        if self._room is not None:
            self._room.give(self._held.pop(batch, 0))
        if self._room is None or tensor.device.type != "cpu" or self._room.take(tensor.nbytes):
            self._here[batch] = tensor
            if self._room is not None and tensor.device.type == "cpu":
                self._held[batch] = tensor.nbytes
            return
        place, size = self._places.get(batch, (0, -1))
        if size < tensor.nbytes:
            place, self._end = self._end, self._end + tensor.nbytes
            self._places[batch] = place, tensor.nbytes
        self._through(os.pwritev, batch, tensor.contiguous())

    def append(self, tensor: Tensor) -> None:
        """One batch more."""
        self._kinds.append((tensor.dtype, tensor.shape))
        self[len(self._kinds) - 1] = tensor

    def kind(self, batch: int) -> Tensor:
        """A tensor of the batch's dtype and shape, without values."""
        dtype, shape = self._kinds[batch]
        return torch.empty(shape, dtype=dtype, device="meta")

    def _through(self, move: object, batch: int, tensor: Tensor) -> None:
        """The tensor's bytes from or into the file."""
        assert callable(move)
        if self._file is None:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                self._file = os.dup(file.fileno())
            weakref.finalize(self, os.close, self._file)
        place, done = self._places[batch][0], 0
        content = memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())) if tensor.nbytes else b""
        while done < tensor.nbytes:
            with writing(self._folder or tempfile.gettempdir()):
                count = move(self._file, [content[done:]], place + done)
            if not count:
                raise OSError("the temporary file of the calibration was cut short; is the disk full?")
            done += count


def _give_all(room: Room, held: dict[int, int]) -> None:
    room.give(sum(held.values()))
