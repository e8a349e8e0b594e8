"""Packed integers to and from tensors: compressed-tensors' bytes, unpacked quickly.

An int32 word holds 32 bits of a little-endian stream; value i of a row starts at bit i * bits, offset by 2^(bits-1).
"""

from __future__ import annotations

import sys

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from torch import Tensor

from hf_shrink.ops.at_once import at_once
from hf_shrink.ops.grid import value_dtype
from hf_shrink.plan import Scheme

# Values unpacked at once on a CPU, so that intermediate results stay in the cache.
CHUNK_VALUES = 1 << 18


def stored_shape(scheme: Scheme, rows: int, columns: int) -> tuple[int, int]:
    """The shape of a weight (rows, columns) as it is held: int32 words where it is packed, else its values."""
    return (rows, -(-columns * scheme.bits // 32)) if scheme.packed else (rows, columns)


def stored_dtype(scheme: Scheme) -> torch.dtype:
    """int32 where the values are packed, else int8 or float8_e4m3fn."""
    return torch.int32 if scheme.packed else value_dtype(scheme)


def pack(values: Tensor, bits: int) -> Tensor:
    """int8 (rows, columns) as int32 (rows, ceil(columns * bits / 32))."""
    packed: Tensor = pack_to_int32(values, bits)
    return packed


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """int32 (rows, words) as int8 (rows, columns): the inverse of `pack`."""
    if sys.byteorder == "big":
        values: Tensor = unpack_from_int32(packed, bits, torch.Size((len(packed), columns)))
        return values
    octets = packed.flatten().view(torch.uint8).view(len(packed), -1)
    if bits == 8:
        return octets.view(torch.int8)[:, :columns].bitwise_xor(-128)  # flipping the top bit subtracts 128
    if missing := -octets.shape[1] % bits:
        octets = torch.nn.functional.pad(octets, (0, missing))
    values = _spread(octets, bits)[:, :columns]
    return values.sub_(1 << bits - 1)


def pack_zero_point(zero_point: Tensor, scheme: Scheme) -> Tensor:
    """Zero points as they are stored: packed along the rows, except one for the whole tensor: int8 (1,)."""
    if scheme.strategy == "tensor":
        return zero_point.reshape(1)
    packed: Tensor = pack_to_int32(zero_point, scheme.bits, packed_dim=0)
    return packed


def unpack_zero_point(stored: Tensor, scheme: Scheme, rows: int) -> Tensor:
    """int8 (rows, columns) from what `pack_zero_point` made; (1,) for strategy "tensor"."""
    if scheme.strategy == "tensor":
        return stored
    return unpack(stored.T, scheme.bits, rows).T


def unpack_weight(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme, columns: int, dtype: torch.dtype
) -> Tensor:
    """The dense weight (rows, columns) in `dtype`.

    Args:
        packed: int32 (rows, words); int8 or float8_e4m3fn (rows, columns) for schemes that are not packed.
        scale: as stored, (rows, groups) or (1,).
        zero_point: int8 (rows, groups) or (1,), unpacked; None when symmetric.
        scheme: bits, strategy and group size.
        columns: in_features.
        dtype: of the result. The product is taken in the wider of this and the scale's dtype, so with `dtype` that
            of the scale it is bit for bit what compressed-tensors decompresses to.
    """
    weight = torch.empty(len(packed), columns, dtype=dtype, device=packed.device)
    wide = torch.promote_types(dtype, scale.dtype)
    groups = (-1, scheme.scale_columns(columns), scheme.group_size or columns)
    scale = _per_group(scale, len(packed)).to(wide)
    zero = None if zero_point is None else _per_group(zero_point, len(packed)).to(wide)
    step = max(1, at_once(packed.device, CHUNK_VALUES) // max(columns, 1))
    for start in range(0, len(packed), step):
        rows = slice(start, start + step)
        values = unpack(packed[rows], scheme.bits, columns) if scheme.packed else packed[rows]
        values = values.reshape(groups).to(wide)
        if zero is not None:
            values -= zero[rows]
        target = weight[rows].view(groups)
        if wide == dtype:
            torch.mul(values, scale[rows], out=target)
        else:
            target.copy_(values * scale[rows])
    return weight


def scaled(values: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """As `unpack_weight`, from values (rows, columns) that are unpacked, in one go."""
    rows, columns = values.shape
    wide = torch.promote_types(dtype, scale.dtype)
    grouped = values.view(rows, scheme.scale_columns(columns), scheme.group_size or columns).to(wide)
    if zero_point is not None:
        grouped -= _per_group(zero_point, rows).to(wide)
    return (grouped * _per_group(scale, rows).to(wide)).to(dtype).view(rows, columns)


def _per_group(stored: Tensor, rows: int) -> Tensor:
    """(rows, groups) or (1,) as (rows, groups, 1)."""
    return stored.view(-1, stored.shape[-1], 1).expand(rows, -1, -1)


def _spread(octets: Tensor, bits: int) -> Tensor:
    """(rows, n * bits) octets as (rows, n * 8) int8, still unsigned: every 8 values come in `bits` octets.

    Halving the stride three times moves each value into an octet of its own, 8 values in one int64 at a time.
    """
    rows, width = octets.shape
    if bits == 4:
        word = octets.view(torch.int32).long()
    else:
        parts = octets.view(rows, width // bits, bits)
        word = parts[..., 0].long()
        for k in range(1, bits):
            word |= parts[..., k].long() << 8 * k
    for count in (4, 2, 1):  # values that move together
        used, room = count * bits, count * 8
        low = sum(((1 << used) - 1) << start for start in range(0, 64, 2 * room))
        moved = word >> used
        word = (word & low) | ((moved & low) << room)
    return word.view(torch.int8)
