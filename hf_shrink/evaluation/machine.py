"""This machine and this process: hardware, and resident memory as Linux counts it.

Only the standard library is imported here, so that the benchmarks can load the file anywhere.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

STATUS, MEMORY, PROCESSORS = Path("/proc/self/status"), Path("/proc/meminfo"), Path("/proc/cpuinfo")


def hardware() -> dict[str, Any]:
    """Processor, cores and memory of this machine."""
    model = _field(PROCESSORS, "model name") or platform.processor() or platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"processor": model, "cores": os.cpu_count(), "memory_gb": round(memory / 2**30, 1)}


def can_measure_memory() -> bool:
    """Whether `resident_bytes` works here: only Linux counts what a process has in memory where it can be read."""
    return STATUS.is_file()


def resident_bytes() -> int:
    """Bytes of this process that are in memory now (VmRSS)."""
    return _kib(STATUS, "VmRSS")


def peak_bytes() -> int:
    """The most bytes of this process that were in memory so far: VmHWM, or getrusage's figure where there is none."""
    if STATUS.is_file():
        return _kib(STATUS, "VmHWM")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_bytes() -> int | None:
    """Bytes that a process can still take without swapping; None where Linux does not say."""
    return _kib(MEMORY, "MemAvailable") if MEMORY.is_file() else None


def _kib(file: Path, name: str) -> int:
    """A field in KiB, in bytes. Raises ValueError where the file has no such field."""
    found = _field(file, name)
    if found is None:
        raise ValueError(f"{file} has no {name}")
    return int(found.split()[0]) * 1024


def _field(file: Path, name: str) -> str | None:
    if not file.is_file():
        return None
    for line in file.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None
