"""Half-precision blocks compute in float32 on a CPU while they are worked on: faster there, and better statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

HALF = (torch.bfloat16, torch.float16)


@contextmanager
def in_float32(block: nn.Module, enabled: bool = True) -> Iterator[None]:
    """The block in float32, and back in its own dtype afterwards. Casting back is exact for what was not changed."""
    stored = next((p.dtype for p in block.parameters() if p.is_floating_point()), torch.float32)
    if not enabled or stored not in HALF:
        yield
        return
    block.to(torch.float32)
    try:
        yield
    finally:
        block.to(stored)


@contextmanager
def float32_for_now(block: nn.Module) -> Iterator[None]:
    """The block in float32 while it computes; afterwards its own tensors are back, untouched."""
    tensors = [t for t in (*block.parameters(), *block.buffers()) if t.is_floating_point() and t.dtype != torch.float32]
    stored = [t.data for t in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, data in zip(tensors, stored, strict=True):
            tensor.data = data
