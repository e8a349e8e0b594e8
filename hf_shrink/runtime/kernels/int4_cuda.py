"""torch's int4 kernel for CUDA (tinygemm): as on the CPU, but for how nibbles lie and who multiplies them.

It computes with the weight in bfloat16, rounded once: what a bfloat16 model with the dequantized weight has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_shrink.runtime.kernels.int4 import Int4, TwoPlanes
from hf_shrink.runtime.kernels.nibbles import Layout
from hf_shrink.runtime.kernels.tiles import (
    MOST_ROWS,
    ROWS,
    check_layout,
    gather_tiles,
    pack_tiles,
    unpack_tiles,
)
from hf_shrink.scheme import Scheme

CAPABILITY = (8, 0)  # of the first devices that multiply bfloat16


class _Tiled(Int4):
    device = "cuda"

    @classmethod
    def refuses(cls, scheme: Scheme, rows: int, columns: int, device: torch.device) -> str | None:
        if torch.version.hip is not None:
            return "is CUDA's, not ROCm's"
        if torch.cuda.get_device_capability(device) < CAPABILITY:
            return "wants a GPU of compute capability 8.0"
        if rows > MOST_ROWS:
            return f"takes up to {MOST_ROWS} rows"
        return super().refuses(scheme, rows, columns, device)

    @classmethod
    def blocks(cls) -> Layout | None:
        return None

    @classmethod
    def _held(cls, nibbles: Tensor) -> Tensor:
        check_layout(nibbles.device)
        return pack_tiles(nibbles)

    def _nibbles(self, rows: Tensor | None) -> Tensor:
        return unpack_tiles(self._weight)[: self.rows] if rows is None else gather_tiles(self._weight, rows)

    def _columns(self, start: int, stop: int) -> Tensor:
        return unpack_tiles(self._weight[start // ROWS : -(-stop // ROWS)]).float().T

    def _multiply(self, tokens: Tensor) -> Tensor:
        return torch._weight_int4pack_mm(tokens, self._weight, self._group, self._scales)


class TiledInt4(_Tiled, Int4):
    """2 to 4 bits."""


class TiledTwoPlanes(_Tiled, TwoPlanes):
    """5 to 8 bits, in two planes: torch's int8 kernel for CUDA (`_weight_int8pack_mm`) has a thread for each output and
    reads every weight alone."""
