"""bfloat16 products where the processor has them: two to four times faster, with float32 sums and parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fast_precision(device: torch.device, cached: bool = True) -> Iterator[None]:
    """Autocast to bfloat16 on accelerators and on CPUs that multiply it natively; as it is elsewhere.

    `cached`: weights are cast once; for a region in which no weight changes.
    """
    with torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bfloat16(device), cache_enabled=cached):
        yield


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are native."""
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
