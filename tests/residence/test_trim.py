"""Memory that was freed goes back to the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SIZE = 8 << 20
SCRIPT = f"""
import sys, torch
from hf_shrink.residence.trim import give_back_large

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def taken():
    return [torch.ones({SIZE} // 4) for _ in range(32)]

torch.ones({16 << 20} // 4).sum()  # freed: from now on glibc keeps pieces below that
if sys.argv[1] == "given back":
    give_back_large()
pieces = taken()
before = resident()
del pieces[:-1]  # the last lies behind them all
print((before - resident()) / (31 * {SIZE}))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
@pytest.mark.parametrize(("how", "least", "most"), [("given back", 0.95, 1.05), ("kept", -0.1, 0.5)])
def test_large_pieces_go_back_as_they_are_freed(how: str, least: float, most: float) -> None:
    """What is kept without it shows that the measurement sees the difference."""
    ran = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
    assert least <= float(ran.stdout) <= most
