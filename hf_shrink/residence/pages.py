"""Pages of memory: which of them a file stands behind, and how to let go of those.

A tensor that is read from a mapped file costs memory only while its pages are there, and they can be let go of at any
time. What was written to such a tensor lies in pages of the process's own (copy on write), which no file has. Linux
tells the two apart in /proc/self/pagemap.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
from collections.abc import Callable

import numpy as np
from torch import Tensor

PAGEMAP = "/proc/self/pagemap"
_PRESENT, _SWAPPED, _OF_A_FILE = 1 << 63, 1 << 62, 1 << 61
_DONTNEED = 4


@functools.cache
def can_tell() -> bool:
    """Whether this system tells a file's pages from the process's own, so that the former can be let go of."""
    return sys.platform.startswith("linux") and os.access(PAGEMAP, os.R_OK) and _madvise() is not None


def is_own(tensor: Tensor) -> bool:
    """Whether any of the tensor's bytes are in memory of the process's own; True where that cannot be told."""
    if tensor.device.type != "cpu" or not can_tell():
        return True
    first, last = _span(tensor)
    if first >= last:
        return False
    with open(PAGEMAP, "rb", buffering=0) as file:
        entries = np.frombuffer(os.pread(file.fileno(), 8 * (last - first), 8 * first), dtype=np.uint64)
    held = entries & np.uint64(_PRESENT | _SWAPPED)
    return bool(np.any((held != 0) & ((entries & np.uint64(_OF_A_FILE)) == 0)))


def let_go(tensor: Tensor) -> None:
    """Give back the pages that are all the tensor's. What was written to them since the file was mapped is lost."""
    if tensor.device.type != "cpu":
        return
    first, last = _span(tensor)
    start, size = tensor.data_ptr(), tensor.nbytes
    first += start > first * mmap.PAGESIZE  # pages at the ends belong to neighbours too
    last -= start + size < last * mmap.PAGESIZE
    madvise = _madvise()
    if madvise is not None and first < last:
        madvise(first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE, _DONTNEED)


def peak_memory() -> int:
    """Most bytes of memory that this process has had at once."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource  # not on Windows, which has neither

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(peak if sys.platform == "darwin" else peak * 1024)


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first page of a contiguous tensor, and the one behind its last."""
    if not tensor.nbytes:
        return 0, 0
    start = tensor.data_ptr()
    return start // mmap.PAGESIZE, -(-(start + tensor.nbytes) // mmap.PAGESIZE)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    function.restype = ctypes.c_int
    found: Callable[[int, int, int], int] = function
    return found
