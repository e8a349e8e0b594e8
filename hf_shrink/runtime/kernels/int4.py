"""torch's int4 kernels: 2 to 4 bits in one plane of nibbles, 5 to 8 bits in two; bfloat16 inputs. Here for the CPU."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_shrink.ops.grid import Grid
from hf_shrink.runtime.kernels.base import Kernel
from hf_shrink.runtime.kernels.nibbles import (
    ROW_STEP,
    Layout,
    gather_nibbles,
    kernel_layout,
    pack_nibbles,
    unpack_columns,
    unpack_nibbles,
)
from hf_shrink.runtime.kernels.scales import join_scale, some, split_scale
from hf_shrink.scheme import Scheme

GROUPS = (256, 128, 64, 32)  # what the kernel takes


def kernel_group(scheme: Scheme, columns: int) -> int | None:
    """The largest group of the kernel's that lies within the scheme's groups; None where there is none."""
    return next((size for size in GROUPS if (scheme.group_size or columns) % size == 0), None)


class Int4(Kernel):
    """W = (q - 8) * scale + zero, as the kernel has it: q - 8 are the stored integers, zero is -zero_point * scale.

    Scales per channel or tensor, and groups larger than the kernel's, are repeated. Rows are filled up to whole
    sixteens.
    """

    name: ClassVar[str] = "int4"
    example: ClassVar[Scheme] = Scheme(4, True, "group", 64)
    device: ClassVar[str] = "cpu"
    bits: ClassVar[tuple[int, int]] = (2, 4)

    def __init__(
        self, scheme: Scheme, rows: int, columns: int, scale_dtype: torch.dtype, few: int, tensors: dict[str, Tensor]
    ) -> None:
        super().__init__(scheme, rows, columns, scale_dtype, few, tensors)
        group = kernel_group(scheme, columns)
        assert group is not None
        self._group, self._weight, self._rest = group, tensors["weight"], tensors.get("rest")
        self._scales = tensors["scales"].view(torch.bfloat16)
        self._padded = self._scales.shape[1] != rows
        self._layout = self.blocks()  # not when it is needed: that may be inside a compiled graph

    @classmethod
    def refuses(cls, scheme: Scheme, rows: int, columns: int, device: torch.device) -> str | None:
        low, high = cls.bits
        if scheme.type != "int" or scheme.activation_bits < 16 or not low <= scheme.bits <= high:
            return f"takes integers of {low} to {high} bits and leaves inputs as they are"
        if kernel_group(scheme, columns) is None:
            return f"takes groups of multiples of 32, not {scheme.group_size or columns}"
        return None

    @classmethod
    def pack(cls, values: Tensor, grid: Grid, few: int) -> Self:
        rows, columns = values.shape
        near, rest = split_scale(grid.scale)
        zero = torch.zeros_like(near) if grid.zero_point is None else (-grid.zero_point * near.float()).to(near.dtype)
        tensors = {
            "weight": cls._held(_filled(values + 8)),
            "scales": _scales(near, zero, rows, columns, kernel_group(grid.scheme, columns)).view(torch.int16),
        }
        if rest is not None:
            tensors["rest"] = rest
        return cls(grid.scheme, rows, columns, grid.scale.dtype, few, tensors)

    def values(self, rows: Tensor | None = None) -> Tensor:
        return self._nibbles(rows).view(torch.int8) - 8

    def scale(self, rows: Tensor | None = None) -> Tensor:
        near = self._near[:, : self.rows] if rows is None else self._near[:, rows]
        near = near.T[:, :: len(near) // self.scheme.scale_columns(self.columns)]
        if self.scheme.strategy == "tensor":
            return join_scale(self._near[:1, 0], self._rest, self.scale_dtype).view(1)
        return join_scale(near, some(self._rest, rows), self.scale_dtype).contiguous()

    def few_rows(self, tokens: Tensor) -> Tensor:
        output = self._multiply(tokens)
        return output[:, : self.rows].contiguous() if self._padded else output

    def unpacked(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        values = self._columns(start, stop)
        return self._scaled(values, 8, self._zero(start, start + values.shape[1]), start, stop, dtype)

    # What the device decides: how nibbles lie, and who multiplies them.

    @classmethod
    def blocks(cls) -> Layout | None:
        return kernel_layout()

    @classmethod
    def _held(cls, nibbles: Tensor) -> Tensor:
        """In the kernel's layout, from 0 to 15 (whole sixteens, columns)."""
        return pack_nibbles(nibbles)

    def _nibbles(self, rows: Tensor | None) -> Tensor:
        """uint8 (rows, columns) of all rows or some."""
        if rows is None:
            return unpack_nibbles(self._weight)[: self.rows]
        return gather_nibbles(self._weight, rows, self._layout)

    def _columns(self, start: int, stop: int) -> Tensor:
        """float32 (columns, n), to be written to: of the rows from `start`, a multiple of 64, to `stop` or beyond."""
        assert self._layout is not None
        return unpack_columns(self._weight, self._layout, start, stop)

    def _multiply(self, tokens: Tensor) -> Tensor:
        """bfloat16 (n, rows made whole sixteens)."""
        return torch._weight_int4pack_mm_for_cpu(tokens, self._weight, self._group, self._scales)

    @property
    def _near(self) -> Tensor:
        """bfloat16 (the kernel's groups, rows made whole sixteens): the scales without their rest."""
        return self._scales[..., 0]

    def _zero(self, start: int, stop: int) -> Tensor:
        return self._scales[:, start:stop, 1].float()

    def _scaled(self, values: Tensor, middle: int, zero: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """(values - middle) * scale + zero, in place of float32 values (columns, n); with the stored scales, not the
        kernel's, where `dtype` can tell them apart. `zero` is rounded to bfloat16, its zero points are whole."""
        scale = self._near[:, start : start + values.shape[1]].float()
        steps = (zero / scale).round_().nan_to_num_()  # rows that fill up have a scale of 0
        if self._rest is not None and dtype != torch.bfloat16:
            scale = self._stored_columns(scale, start, stop)
        grouped = values.view(-1, self._group, values.shape[1])
        shift = ((steps - middle) * scale)[:, None]
        if torch.compiler.is_compiling():  # it refuses `out` where that has gaps, and saves the memory by itself
            values = torch.addcmul(shift, grouped, scale[:, None]).view(values.shape)
        else:
            torch.addcmul(shift, grouped, scale[:, None], out=grouped)
        return values[:, : stop - start].to(dtype)

    def _stored_columns(self, near: Tensor, start: int, stop: int) -> Tensor:
        """The stored scales of some rows in the place of `near`, float32 (groups, rows)."""
        stored = self.scale().float()
        stored = stored.view(1, 1).expand(1, stop - start) if stored.dim() == 1 else stored[start:stop].T
        exact = near.clone()
        exact[:, : stop - start] = stored.repeat_interleave(len(near) // len(stored), 0)
        return exact


class TwoPlanes(Int4):
    """8 bits as 16 * high + low: two columns of nibbles for every column, and the input twice.

    (16 high + low - 128) * scale = (high - 8) * 16 scale + (low - 8) * scale + 8 scale, and both planes have a zero:
    one takes what the other loses in bfloat16.
    """

    name: ClassVar[str] = "int4 twice"
    example: ClassVar[Scheme] = Scheme(8, True, "group", 64)
    bits: ClassVar[tuple[int, int]] = (5, 8)

    @classmethod
    def pack(cls, values: Tensor, grid: Grid, few: int) -> Self:
        rows, columns = values.shape
        group = kernel_group(grid.scheme, columns)
        near, rest = split_scale(grid.scale)
        zero = near.float() * (8 if grid.zero_point is None else 8 - grid.zero_point)
        coarse = zero.to(torch.bfloat16)
        fine = (zero - coarse.float()).to(torch.bfloat16)
        octets = values.view(torch.uint8) ^ 128
        tensors = {
            "weight": cls._held(_filled(torch.cat([octets >> 4, octets & 15], 1))),
            "scales": torch.cat(
                [_scales(near * 16, coarse, rows, columns, group), _scales(near, fine, rows, columns, group)]
            ).view(torch.int16),
        }
        if rest is not None:
            tensors["rest"] = rest
        return cls(grid.scheme, rows, columns, grid.scale.dtype, few, tensors)

    def values(self, rows: Tensor | None = None) -> Tensor:
        high, low = self._nibbles(rows).chunk(2, 1)
        return ((high << 4 | low) ^ 128).view(torch.int8)

    def few_rows(self, tokens: Tensor) -> Tensor:
        return super().few_rows(torch.cat([tokens, tokens], 1))

    def unpacked(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        high, low = self._columns(start, stop).chunk(2)
        values = low.add_(high, alpha=16)
        return self._scaled(values, 136, self._zero(start, start + values.shape[1]), start, stop, dtype)

    @property
    def _near(self) -> Tensor:
        return self._scales[len(self._scales) // 2 :, :, 0]

    def _zero(self, start: int, stop: int) -> Tensor:
        coarse, fine = self._scales[:, start:stop, 1].float().chunk(2)
        return coarse + fine


def _filled(nibbles: Tensor) -> Tensor:
    """With rows of zeros up to whole sixteens."""
    return F.pad(nibbles, (0, 0, 0, -len(nibbles) % ROW_STEP))


def _scales(scale: Tensor, zero: Tensor, rows: int, columns: int, group: int | None) -> Tensor:
    """(the kernel's groups, rows made whole sixteens, 2) from (rows or 1, the scheme's groups)."""
    assert group is not None
    both = torch.stack([scale, zero], -1).expand(rows, -1, -1)
    both = both.repeat_interleave(columns // group // both.shape[1], 1)
    return F.pad(both, (0, 0, 0, 0, 0, -rows % ROW_STEP)).transpose(0, 1).contiguous()
