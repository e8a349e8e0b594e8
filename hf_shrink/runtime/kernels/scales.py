"""Scales in bfloat16 for a kernel, and what it takes to have the stored ones back, bit for bit."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor


def split_scale(scale: Tensor) -> tuple[Tensor, Tensor | None]:
    """The nearest bfloat16, and the rest in two octets a scale (None where there is none).

    Args:
        scale: bfloat16, float16 or float32.
    """
    if scale.dtype == torch.bfloat16:
        return scale, None
    if scale.dtype == torch.float16:
        near = scale.to(torch.bfloat16)
        return near, (None if torch.equal(near.to(torch.float16), scale) else scale.contiguous().view(torch.int16))
    bits = scale.contiguous().view(torch.int32)
    upper = (bits + 0x8000) >> 16
    rest = (bits - (upper << 16)).to(torch.int16)
    return upper.to(torch.int16).view(torch.bfloat16), rest if rest.any() else None


def join_scale(near: Tensor, rest: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What was split, in its own `dtype` again."""
    if rest is None:
        return near.to(dtype)
    if dtype == torch.float16:
        return rest.view(torch.float16)
    return ((near.contiguous().view(torch.int16).to(torch.int32) << 16) + rest).view(torch.float32)


@overload
def some(held: Tensor, rows: Tensor | None) -> Tensor: ...
@overload
def some(held: None, rows: Tensor | None) -> None: ...
@overload
def some(held: Tensor | None, rows: Tensor | None) -> Tensor | None: ...
def some(held: Tensor | None, rows: Tensor | None) -> Tensor | None:
    """The given rows of what is held, if any; all of it without numbers."""
    return held if held is None or rows is None else held[rows]
