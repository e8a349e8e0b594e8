"""Safetensors files written tensor by tensor, so that they may be larger than memory, and mapped to be read."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

# The names that the format has for dtypes, in the order in which the safetensors library writes them (largest last).
DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_RANK = {dtype: place for place, dtype in enumerate(DTYPES)}


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    read: Callable[[str], Tensor] | None = None,
    done: Callable[[Tensor], None] = lambda tensor: None,
) -> None:
    """Write what `safetensors.torch.save_file` writes, byte for byte, with one tensor in work at a time.

    The file is there, on the disk, when it is whole.

    Args:
        tensors: by name; of them only dtype and shape are looked at where `read` gives the values.
        read: a tensor's values, when it is its turn.
        done: called with a tensor once it is written.
    """
    names = sorted(tensors, key=lambda name: (-_RANK[tensors[name].dtype], name.encode()))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f"{path.name}.partial")
    with writing(partial), partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = (tensors[name] if read is None else read(name)).detach().cpu().contiguous()
            file.write(_bytes_of(tensor))
            done(tensor)
        flush(file.fileno(), file)
    os.replace(partial, path)
    flush_folder(path.parent)


@contextmanager
def writing(place: Path | str) -> Iterator[None]:
    """An error of the system that names no file, as that of a full disk, names `place` from here on."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(place)
        raise


def map_tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in memory only as far as they are read."""
    with safe_open(path, framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}


def flush(descriptor: int, file: Any = None) -> None:
    """Onto the disk, with what Python still holds of `file`."""
    if file is not None:
        file.flush()
    os.fsync(descriptor)


def flush_folder(folder: Path) -> None:
    """The folder's own entries onto the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    if not tensor.nbytes:
        return memoryview(b"")
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
