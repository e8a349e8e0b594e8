"""Give memory that was freed back to the system."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any

_MMAP_THRESHOLD = -3  # of mallopt
LARGE = 4 << 20  # bytes


def release_free_memory() -> None:
    """Hand free pages back. The C library keeps what large tensors leave behind, in pieces that the next do not fit.

    Does nothing where the C library has no `malloc_trim` (only glibc has).
    """
    trim = _of_c_library("malloc_trim")
    if trim is not None:
        trim(0)


def give_back_large() -> None:
    """From now on pieces of LARGE bytes and more go back to the system when they are freed, in all of this process.

    Otherwise glibc keeps what is below 32 MB once such a piece was freed, and a run on block after block ends up with
    more and more of it in pieces (100 MB on blocks of 54 MB). Costs some percent of the time, in pages handed over.
    Does nothing where the C library has no `mallopt`.
    """
    mallopt = _of_c_library("mallopt")
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, LARGE)


@functools.cache
def _of_c_library(name: str) -> Callable[..., Any] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
