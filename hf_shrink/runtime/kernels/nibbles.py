"""Four-bit values in the layout of torch's int4 kernel for the CPU, and back.

`_convert_weight_to_int4pack_for_cpu` lays rows out in blocks; in a block, column by column, two rows share an octet.
How many rows a block has, and which two, depends on the processor, so it is found by trying.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from hf_shrink.errors import ShrinkError

ROW_STEP = 16  # the kernel takes rows in whole sixteens
_PACKED_AT_ONCE = 1 << 18  # values: the packing op wants them in int32


class Layout(NamedTuple):
    """How rows lie in a whole block.

    Attributes:
        block: rows of one.
        halves: an octet holds row i of the first half and row i of the second; otherwise rows 2 i and 2 i + 1. What is
            left behind the last whole block always lies in the second way.
    """

    block: int
    halves: bool


# AVX-512; AVX2; vectors of 8 floats without these; vectors of 4 floats.
_KNOWN = (Layout(64, True), Layout(32, True), Layout(32, False), Layout(16, False), Layout(64, False))


def pack_nibbles(values: Tensor) -> Tensor:
    """uint8 (rows, columns / 2) in the kernel's layout from integers 0 to 15 (rows, columns).

    Rows must be whole sixteens and columns even.
    """
    rows, columns = values.shape
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8)
    step = max(1, _PACKED_AT_ONCE // (64 * columns)) * 64  # whole blocks lie one behind the other
    for start in range(0, rows, step):
        part = values[start : start + step].to(torch.int32)
        packed[start : start + step] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(part, 1)
    return packed


def unpack_nibbles(packed: Tensor, layout: Layout | None = None) -> Tensor:
    """uint8 (rows, columns), the inverse of `pack_nibbles`."""
    layout = layout or kernel_layout()
    rows, columns = len(packed), packed.shape[1] * 2
    whole = rows - rows % layout.block
    blocks = packed[:whole].reshape(-1, columns, layout.block // 2)
    values = _octets(blocks, layout.halves).transpose(1, 2).reshape(whole, columns)
    if whole == rows:
        return values
    rest = packed[whole:].reshape(1, columns, (rows - whole) // 2)
    return torch.cat([values, _octets(rest, False)[0].T])


def _octets(octets: Tensor, halves: bool) -> Tensor:
    """(..., n) octets as (..., 2 n) values."""
    low, high = octets & 15, octets >> 4
    return torch.cat([low, high], -1) if halves else torch.stack([low, high], -1).flatten(-2)


def gather_nibbles(packed: Tensor, rows: Tensor, layout: Layout | None = None) -> Tensor:
    """uint8 (len(rows), columns): single rows, without unpacking others."""
    layout, columns = layout or kernel_layout(), packed.shape[1] * 2
    whole = len(packed) - len(packed) % layout.block
    flat = packed.flatten()
    width = torch.where(rows < whole, layout.block // 2, (len(packed) - whole) // 2)
    inside = torch.where(rows < whole, rows % layout.block, rows - whole)
    apart = (rows < whole) & layout.halves
    octet = torch.where(apart, inside % (layout.block // 2), inside // 2)
    high = torch.where(apart, inside >= layout.block // 2, inside % 2 == 1)
    start = (rows - inside) * (columns // 2) + octet
    found = flat[start[:, None] + width[:, None] * torch.arange(columns)]
    return torch.where(high[:, None], found >> 4, found & 15)


@cache
def kernel_layout() -> Layout:
    """The layout of this process's kernel. Raises ShrinkError where torch has a new one."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(16, (112, 6), generator=generator, dtype=torch.uint8)
    packed = pack_nibbles(values)
    for layout in _KNOWN:
        if torch.equal(unpack_nibbles(packed, layout), values):
            return layout
    raise ShrinkError(
        f"torch {torch.__version__} packs 4-bit weights in a layout that hf_shrink does not know; load with "
        "optimize=False, or update hf_shrink"
    )


def unpack_columns(packed: Tensor, layout: Layout, start: int, stop: int) -> Tensor:
    """float32 (columns, n): values of the rows from `start`, a multiple of 64, to `stop`, made whole sixteens."""
    columns = packed.shape[1] * 2
    end = min(stop + -stop % ROW_STEP, len(packed))
    whole = end - end % layout.block
    values = torch.empty(columns, end - start)
    if whole > start:
        blocks = packed[start:whole].view(-1, columns, layout.block // 2)
        target = values[:, : whole - start].view(columns, -1, layout.block)
        target.copy_(_octets(blocks, layout.halves).transpose(0, 1))
    if whole < end:
        rest = packed[whole:].view(columns, (len(packed) - whole) // 2)
        values[:, whole - start :] = _octets(rest, False)[:, : end - whole]
    return values
