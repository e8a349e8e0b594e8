"""torch's int8 kernel for the CPU: symmetric weights of 5 to 8 bits with one scale per row; bfloat16 inputs."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor

from hf_shrink.ops.grid import Grid
from hf_shrink.runtime.kernels.base import Kernel
from hf_shrink.runtime.kernels.scales import join_scale, some, split_scale
from hf_shrink.scheme import Scheme

_COLUMN_STEP = 32  # with other widths the kernel of torch 2.13 reads beyond its operands
_multiply = torch._weight_int8pack_mm


class Int8(Kernel):
    """W = q * scale, the integers as they are, one octet each."""

    name: ClassVar[str] = "int8"
    example: ClassVar[Scheme] = Scheme(8, True, "channel", None)
    device: ClassVar[str] = "cpu"

    def __init__(
        self, scheme: Scheme, rows: int, columns: int, scale_dtype: torch.dtype, few: int, tensors: dict[str, Tensor]
    ) -> None:
        super().__init__(scheme, rows, columns, scale_dtype, few, tensors)
        self._weight, self._rest = tensors["weight"], tensors.get("rest")
        self._scale = tensors["scales"].view(torch.bfloat16)

    @classmethod
    def refuses(cls, scheme: Scheme, rows: int, columns: int, device: torch.device) -> str | None:
        if scheme.type != "int" or scheme.activation_bits < 16 or scheme.bits < 5:
            return "takes integers of 5 to 8 bits and leaves inputs as they are"
        if scheme.strategy == "group" or not scheme.symmetric:
            return "takes one scale per row and no zero points"
        return f"takes widths in multiples of {_COLUMN_STEP}, not {columns}" if columns % _COLUMN_STEP else None

    @classmethod
    def pack(cls, values: Tensor, grid: Grid, few: int) -> Self:
        near, rest = split_scale(grid.scale.view(-1))
        tensors = {"weight": values.contiguous(), "scales": near.expand(len(values)).contiguous().view(torch.int16)}
        if rest is not None:
            tensors["rest"] = rest
        return cls(grid.scheme, values.shape[0], values.shape[1], grid.scale.dtype, few, tensors)

    def values(self, rows: Tensor | None = None) -> Tensor:
        return self._weight if rows is None else self._weight[rows]

    def scale(self, rows: Tensor | None = None) -> Tensor:
        if self.scheme.strategy == "tensor":
            return join_scale(self._scale[:1], self._rest, self.scale_dtype)
        near, rest = some(self._scale, rows), some(self._rest, rows)
        return join_scale(near, rest, self.scale_dtype).view(-1, 1)

    def few_rows(self, tokens: Tensor) -> Tensor:
        return _multiply(tokens, self._weight, self._scale)

    def unpacked(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        scale = self.scale() if dtype != torch.bfloat16 else self._scale.view(-1, 1)
        scale = scale.view(1, 1) if scale.dim() == 1 else scale[start:stop]
        return (self._weight[start:stop].to(wide) * scale.to(wide)).to(dtype).T
