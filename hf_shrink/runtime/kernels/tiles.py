"""Four-bit values in the layout of torch's int4 kernel for CUDA (tinygemm), and back.

`_convert_weight_to_int4pack` makes tiles of 8 rows and 16 columns, as the tensor cores' m16n8k16 product wants its
second operand. A word of 32 bits holds, for one row, four values of each of two neighbouring tiles; 2, 4 or 8 tiles lie
side by side in a super tile: int32 (rows / 8, columns / (16 tiles), 32 lanes, tiles / 2).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from hf_shrink.errors import ShrinkError

ROWS = 8  # of a tile
COLUMNS = 16
MOST_ROWS = 8 * 65535  # of a weight: the kernel counts tiles of rows in a dimension of CUDA's grid
_LANES = 4  # of a row: a lane holds the columns 2 c, 2 c + 1, 2 c + 8 and 2 c + 9 of every tile


def inner_tiles(columns: int) -> int:
    """How many tiles a super tile has: as many as the kernel takes and the columns, whole 32s, allow."""
    return next(tiles for tiles in (8, 4, 2) if columns % (tiles * COLUMNS) == 0)


def pack_tiles(values: Tensor) -> Tensor:
    """The kernel's words from integers 0 to 15, uint8 or int8 (rows, columns), whole eights and whole 32s."""
    octets = values.view(torch.uint8)
    octets = octets[:, ::2] << 4 | octets[:, 1::2]
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack(octets, inner_tiles(values.shape[1]))
    return packed


def unpack_tiles(packed: Tensor) -> Tensor:
    """uint8 (rows, columns), the inverse of `pack_tiles`."""
    tiles, supers, _, words = packed.shape
    rows = packed.view(tiles, supers, ROWS, _LANES * words).transpose(1, 2).reshape(tiles * ROWS, supers, _LANES, words)
    return _unpacked(rows)


def gather_tiles(packed: Tensor, rows: Tensor) -> Tensor:
    """uint8 (len(rows), columns): single rows, without unpacking others."""
    tiles, supers, _, words = packed.shape
    found = packed.view(tiles, supers, ROWS, _LANES, words)[rows // ROWS, :, rows % ROWS]
    return _unpacked(found)


def _unpacked(words: Tensor) -> Tensor:
    """uint8 (n, columns) from the words (n, super tiles, lanes, words) of n rows."""
    count, supers, lanes, width = words.shape
    octets = words.contiguous().view(torch.uint8).view(count, supers, lanes, width, 2, 2)  # ..., odd columns, tile
    # Of each tile the low half is what lies in the columns 2 c (or 2 c + 1), the high half 8 columns further.
    both = torch.stack([octets & 15, octets >> 4], -1)  # (n, super, c, word, odd, tile, half)
    return both.permute(0, 1, 3, 5, 6, 2, 4).reshape(count, supers * width * 2 * COLUMNS)


@cache
def check_layout(device: torch.device) -> None:
    """Raises ShrinkError where this torch packs otherwise."""
    generator = torch.Generator().manual_seed(0)
    for columns in (32, 64, 384):
        values = torch.randint(16, (24, columns), generator=generator, dtype=torch.uint8).to(device)
        if not torch.equal(unpack_tiles(pack_tiles(values)), values):
            raise ShrinkError(
                f"torch {torch.__version__} packs 4-bit weights for {device.type} in a layout that hf_shrink does not "
                "know; load with optimize=False, or update hf_shrink"
            )
