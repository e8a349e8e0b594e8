"""torch's int4 kernel for the CPU: 2 to 4 bits, bfloat16 inputs."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor

from hf_shrink.ops.grid import Grid
from hf_shrink.runtime.kernels.base import Kernel
from hf_shrink.runtime.kernels.blocks import blockwise_linear, output_dtype
from hf_shrink.runtime.kernels.nibbles import ROW_STEP, pack_nibbles, unpack_columns, unpack_nibbles
from hf_shrink.runtime.kernels.scales import join_scale, split_scale
from hf_shrink.scheme import Scheme

GROUPS = (256, 128, 64, 32)  # what the kernel takes
_multiply = torch._weight_int4pack_mm_for_cpu


def kernel_group(scheme: Scheme, columns: int) -> int | None:
    """The largest group of the kernel's that lies within the scheme's groups; None where there is none."""
    return next((size for size in GROUPS if (scheme.group_size or columns) % size == 0), None)


class Int4(Kernel):
    """W = (q - 8) * scale + zero, as the kernel has it: q - 8 are the stored integers, zero is -zero_point * scale.

    Scales per channel or tensor, and groups larger than the kernel's, are repeated. Rows are filled up to whole
    sixteens.
    """

    name: ClassVar[str] = "int4"

    def __init__(
        self, scheme: Scheme, rows: int, columns: int, scale_dtype: torch.dtype, few: int, tensors: dict[str, Tensor]
    ) -> None:
        super().__init__(scheme, rows, columns, scale_dtype, few, tensors)
        group = kernel_group(scheme, columns)
        assert group is not None
        self._group, self._weight, self._rest = group, tensors["weight"], tensors.get("rest")
        self._scales = tensors["scales"].view(torch.bfloat16)
        self._padded = len(self._weight) != rows

    @classmethod
    def refuses(cls, scheme: Scheme, rows: int, columns: int, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"not on {device.type}"
        if scheme.type != "int" or scheme.activation_bits < 16 or scheme.bits > 4:
            return f"{scheme.name} has other values than 2 to 4 bit integers"
        if kernel_group(scheme, columns) is None:
            return f"groups of {scheme.group_size or columns}, where the kernel takes multiples of 32"
        return None

    @classmethod
    def pack(cls, values: Tensor, grid: Grid, few: int) -> Self:
        rows, columns = values.shape
        group = kernel_group(grid.scheme, columns)
        assert group is not None
        missing = -rows % ROW_STEP
        near, rest = split_scale(grid.scale)
        zero = torch.zeros_like(near) if grid.zero_point is None else (-grid.zero_point * near.float()).to(near.dtype)
        groups = columns // group
        both = torch.stack([near, zero], -1)  # (rows or 1, groups of the scheme, 2)
        both = both.expand(rows, -1, -1).repeat_interleave(groups // both.shape[1], 1)
        both = torch.nn.functional.pad(both, (0, 0, 0, 0, 0, missing)).transpose(0, 1).contiguous()
        nibbles = torch.nn.functional.pad(values + 8, (0, 0, 0, missing))
        tensors = {"weight": pack_nibbles(nibbles), "scales": both.view(torch.int16)}
        if rest is not None:
            tensors["rest"] = rest
        return cls(grid.scheme, rows, columns, grid.scale.dtype, few, tensors)

    def values(self) -> Tensor:
        return unpack_nibbles(self._weight)[: self.rows].view(torch.int8) - 8

    def scale(self) -> Tensor:
        scheme = self.scheme
        near = self._scales[:, : self.rows, 0].T
        near = near[:, :: near.shape[1] // scheme.scale_columns(self.columns)]
        if scheme.strategy == "tensor":
            return join_scale(near[:1], self._rest, self.scale_dtype).view(1)
        return join_scale(near, self._rest, self.scale_dtype).contiguous()

    def linear(self, input: Tensor, bias: Tensor | None) -> Tensor:
        dtype = input.dtype
        if dtype is torch.bfloat16:
            tokens = input.reshape(-1, self.columns)
            if not 0 < tokens.shape[0] <= self.few:
                return blockwise_linear(self, input, bias)
            output = _multiply(tokens.contiguous(), self._weight, self._group, self._scales)
            if self._padded:
                output = output[:, : self.rows]
            if bias is not None:
                output = output + bias
            return output.reshape((*input.shape[:-1], self.rows))
        kept = output_dtype(input)
        if dtype is torch.float64 or not 0 < input.numel() <= self.few * self.columns:
            return blockwise_linear(self, input, bias).to(kept)
        output = self.linear(input.to(torch.bfloat16), None).to(kept)
        return output if bias is None else output + bias.to(kept)

    def unpacked(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        values = unpack_columns(self._weight, start, stop)
        scale, zero = self._scales[:, start : start + values.shape[1]].float().unbind(-1)
        if self._rest is not None and dtype != torch.bfloat16:  # with the stored scales, not the kernel's
            steps = (zero / scale).round_().nan_to_num_()
            scale = self._stored_columns(scale, start, stop)
            zero = steps * scale
        grouped = values.view(-1, self._group, values.shape[1])
        torch.addcmul((zero - 8 * scale)[:, None], grouped, scale[:, None], out=grouped)
        return values[:, : stop - start].to(dtype)

    def _stored_columns(self, near: Tensor, start: int, stop: int) -> Tensor:
        """The stored scales of some rows in the place of `near`, float32 (groups, rows)."""
        stored = self.scale().float()
        stored = stored[start:stop].T if len(stored) == self.rows else stored.view(1, 1).expand(1, stop - start)
        exact = near.clone()
        exact[:, : stop - start] = stored.repeat_interleave(len(near) // len(stored), 0)
        return exact
