# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, untyped-decorator"
"""What surrounds torch's products on CUDA, in one launch each, with Triton, which torch brings along there.

Elementwise operations read and write a weight's values eight times until it is unpacked. On an H100, unpacking a weight
of 16 million values so took 255 µs, and its product with 64 tokens 15.
"""

from __future__ import annotations

import torch
import triton
import triton.errors
import triton.language as tl
from torch import Tensor

Failed = triton.errors.TritonError  # where a kernel cannot be compiled
_BLOCK = 32, 128  # rows and columns that a program unpacks


@triton.jit
def _unpack_tiles(
    packed,
    scales,
    weight,
    rows,
    columns,
    group,
    held_rows,  # of the scales
    supers,
    words: tl.constexpr,  # of a lane in a super tile
    planes: tl.constexpr,
    n_block: tl.constexpr,
    k_block: tl.constexpr,
):
    n = tl.program_id(1) * n_block + tl.arange(0, n_block)[:, None]
    k = tl.program_id(0) * k_block + tl.arange(0, k_block)[None, :]
    there = (n < rows) & (k < columns)
    # See `tiles.py`: which word a value is in, and which four bits of it.
    shift = 4 * ((k // 16) % 2 * 2 + (k // 8) % 2 + 4 * (k % 2))
    lane = (n % 8) * 4 + (k % 8) // 2
    place = ((n // 8 * supers + k // (32 * words)) * 32 + lane) * words + k // 32 % words
    value = (tl.load(packed + place, there, 0) >> shift) & 15
    at = ((k // group) * held_rows + n) * 2
    zero = tl.load(scales + at + 1, there, 0.0).to(tl.float32)
    if planes == 2:
        late = k + columns
        lower = ((n // 8 * supers + late // (32 * words)) * 32 + (n % 8) * 4 + (late % 8) // 2) * words
        lower += late // 32 % words
        lower_shift = 4 * ((late // 16) % 2 * 2 + (late // 8) % 2 + 4 * (late % 2))
        value = value * 16 + ((tl.load(packed + lower, there, 0) >> lower_shift) & 15) - 136
        at += columns // group * held_rows * 2
        zero += tl.load(scales + at + 1, there, 0.0).to(tl.float32)
    else:
        value -= 8
    scale = tl.load(scales + at, there, 0.0).to(tl.float32)
    tl.store(weight + n * columns + k, (value.to(tl.float32) * scale + zero).to(weight.dtype.element_ty), there)


def unpack_tiles(packed: Tensor, scales: Tensor, rows: int, group: int, planes: int, dtype: torch.dtype) -> Tensor:
    """(rows, columns) in `dtype` of a weight in one plane of nibbles or two.

    Args:
        packed: int32 (tiles, super tiles, 32, words), of whole tiles of rows.
        scales: bfloat16 (planes * groups, rows or more, 2), scales and zeros, contiguous but for their rows.
        group: columns that share a scale.
    """
    _, supers, _, words = packed.shape
    columns = supers * words * 32 // planes
    weight = torch.empty(rows, columns, dtype=dtype, device=packed.device)
    n_block, k_block = _BLOCK
    grid = triton.cdiv(columns, k_block), triton.cdiv(rows, n_block)
    held_rows = scales.stride(0) // 2
    _unpack_tiles[grid](
        packed, scales, weight, rows, columns, group, held_rows, supers, words, planes, n_block, k_block
    )
    return weight


@triton.jit
def _unpack_octets(values, scales, weight, count, columns, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    there = at < count
    scale = tl.load(scales + at // columns, there, 0.0)
    value = tl.load(values + at, there).to(tl.float32) * scale
    tl.store(weight + at, value.to(weight.dtype.element_ty), there)


def unpack_octets(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(rows, columns) in `dtype` of float8_e4m3fn or int8 values and a float32 scale for each row."""
    weight = torch.empty(values.shape, dtype=dtype, device=values.device)
    block = 2048
    _unpack_octets[(triton.cdiv(values.numel(), block),)](values, scale, weight, values.numel(), values.shape[1], block)
    return weight


@triton.jit
def _split(tokens, both, scales, count, columns, smallest, largest, finer, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, block)
    there = place < columns
    value = tl.load(tokens + row * columns + place, there, 0.0).to(tl.float32)
    size = tl.max(tl.abs(value))
    power = (size.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    scale = tl.div_rn(tl.maximum(power, smallest), largest)  # all of them powers of two: exact
    value = tl.div_rn(value, scale)
    first = value.to(both.dtype.element_ty)
    second = ((value - first.to(tl.float32)) * finer).to(both.dtype.element_ty)
    tl.store(both + row * columns + place, first, there)
    tl.store(both + (count + row) * columns + place, second, there)
    tl.store(scales + row, scale)
    tl.store(scales + count + row, tl.div_rn(scale, finer))


def split(tokens: Tensor, float8: torch.dtype, smallest: float, largest: float, finer: float) -> tuple[Tensor, Tensor]:
    """See `octets.as_two_float8`."""
    count, columns = tokens.shape
    both = torch.empty(2 * count, columns, dtype=float8, device=tokens.device)
    scales = torch.empty(2 * count, 1, dtype=torch.float32, device=tokens.device)
    block = triton.next_power_of_2(columns)
    _split[(count,)](tokens, both, scales, count, columns, smallest, largest, finer, block, num_warps=8)
    return both, scales
