"""Tensors that nobody reads for a while: so many stay in memory, the others wait in a file."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from hf_shrink.residence import Room, writing

IN_MEMORY = 64 << 20  # bytes that stay in memory; what is over goes to the file
SMALLEST = 1 << 20  # bytes; less is not worth a system call


class Shelf:
    """Takes the bytes of CPU tensors into an unnamed temporary file, and gives them back into the same tensors.

    A tensor object and everything that holds it stay as they are; only its storage is empty meanwhile, so that it must
    not be read before `give_back`. The file vanishes with the shelf.

    Args:
        room: what may stay in memory, shared with others; None: IN_MEMORY.
        folder: of the file; None: the system's for temporary files.
    """

    def __init__(self, room: Room | None = None, folder: Path | None = None) -> None:
        self._room = Room(IN_MEMORY) if room is None else room
        self._folder = folder or tempfile.gettempdir()
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - lives as long as the shelf
        self._inside: dict[int, int] = {}  # owner -> bytes that it has in memory
        self._outside: dict[int, list[tuple[torch.UntypedStorage, int, int]]] = {}
        self._free: dict[int, list[int]] = {}
        self._end = 0

    @property
    def in_file(self) -> int:
        """Bytes that are in the file now."""
        return sum(size for parts in self._outside.values() for _, _, size in parts)

    def take(self, owner: int, tensors: Sequence[Tensor]) -> None:
        """Put an owner's tensors away, each once. Does nothing for an owner whose tensors are here already."""
        if owner in self._inside or owner in self._outside:
            return
        found = [storage for tensor in tensors if (storage := _own_storage(tensor)) is not None]
        storages = list({storage.data_ptr(): storage for storage in found}.values())  # views have one in common
        size = sum(storage.nbytes() for storage in storages)
        if self._room.take(size):
            self._inside[owner] = size
        else:
            self._outside[owner] = [self._write(storage) for storage in storages]

    def give_back(self, owner: int) -> None:
        """Fill an owner's tensors again. Does nothing for an owner without any here."""
        self._room.give(self._inside.pop(owner, 0))
        for storage, place, size in self._outside.pop(owner, []):
            storage.resize_(size)
            done, content = 0, _bytes_of(storage)
            while done < size:
                count = os.preadv(self._file.fileno(), [content[done:]], place + done)
                if count == 0:
                    raise OSError("the temporary file of the calibration was cut short; is the disk full?")
                done += count
            self._free.setdefault(size, []).append(place)

    def _write(self, storage: torch.UntypedStorage) -> tuple[torch.UntypedStorage, int, int]:
        size = storage.nbytes()
        free = self._free.get(size)
        place = free.pop() if free else self._end
        self._end = max(self._end, place + size)
        done, content = 0, _bytes_of(storage)
        while done < size:
            with writing(self._folder):
                done += os.pwrite(self._file.fileno(), content[done:], place + done)
        storage.resize_(0)
        return storage, place, size

    def __enter__(self) -> Shelf:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for owner in [*self._inside]:
            self.give_back(owner)
        self._file.close()


def _own_storage(tensor: Tensor) -> torch.UntypedStorage | None:
    """The tensor's storage; None for small ones, views of something larger, and other devices' tensors."""
    storage = tensor.untyped_storage()
    if tensor.device.type != "cpu" or not SMALLEST <= storage.nbytes() <= tensor.nbytes or not storage.resizable():
        return None
    return storage


def _bytes_of(storage: torch.UntypedStorage) -> memoryview:
    """The storage's memory itself. Not through numpy, which would pin the storage to its size for good."""
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr()))
