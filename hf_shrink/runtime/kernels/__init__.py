"""Weights in the layouts of the kernels that torch ships, and which of them a weight is given."""

from __future__ import annotations

import torch

from hf_shrink.runtime.kernels.base import Kernel
from hf_shrink.runtime.kernels.int4 import Int4, TwoPlanes
from hf_shrink.runtime.kernels.int4_cuda import TiledInt4, TiledTwoPlanes
from hf_shrink.runtime.kernels.int8 import Int8
from hf_shrink.runtime.kernels.octets import Float8, Int8Tokens
from hf_shrink.scheme import Scheme

# Of a device's kernels the first that takes a weight has it.
KERNELS: tuple[type[Kernel], ...] = (Int4, Int8, TwoPlanes, TiledInt4, TiledTwoPlanes, Float8, Int8Tokens)
# Values of a weight that a CPU's caches do not hold (output heads): there two planes of nibbles are faster than octets.
_STREAMED = 1 << 24
_FROM_MEMORY: tuple[type[Kernel], ...] = (TwoPlanes, *(kernel for kernel in KERNELS if kernel is not TwoPlanes))

__all__ = ["KERNELS", "Kernel", "kernel_for"]


def kernel_for(
    scheme: Scheme, rows: int, columns: int, device: torch.device, scale_dtype: torch.dtype
) -> tuple[type[Kernel] | None, str]:
    """The kernel that a weight is given, and a word on it: its name, or why there is none."""
    if device.type == "meta":
        return None, "its values are elsewhere (meta device)"
    if scale_dtype == torch.float64:
        return None, "its scales are float64"
    reasons = []
    for kernel in KERNELS if rows * columns < _STREAMED else _FROM_MEMORY:
        if kernel.device != device.type:
            continue
        reason = kernel.refuses(scheme, rows, columns, device)
        if reason is None:
            return kernel, kernel.name
        reasons.append(f"{kernel.name}: {reason}")
    return None, f"{scheme.name}: " + ("; ".join(reasons) or f"there are no kernels for {device.type}")
