"""How many values elementwise work takes at once."""

from __future__ import annotations

import torch

# Accelerators have no caches worth keeping to, and every call costs some microseconds: only memory is a limit.
ACCELERATOR = 1 << 26


def at_once(device: torch.device, cached: int) -> int:
    """`cached` on the CPU: so many stay in its caches. More on an accelerator."""
    return cached if device.type == "cpu" else ACCELERATOR
