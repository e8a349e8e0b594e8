"""Kernels for CUDA whose weight is one octet a value with one scale per row: FP8A16 and W8A8."""

from __future__ import annotations

from abc import abstractmethod
from functools import cache
from typing import ClassVar, Self

import torch
from torch import Tensor

from hf_shrink.ops.grid import FLOAT8, Grid
from hf_shrink.runtime.int8 import int8_linear, multiplies_int8
from hf_shrink.runtime.kernels.base import Kernel
from hf_shrink.runtime.kernels.scales import some
from hf_shrink.scheme import Scheme

_EXPONENT = 0x7F800000  # of a float32
_LARGEST = 128.0  # inputs are scaled to less than twice this
_FINER = 16.0  # so much smaller is what the first float8 of an input leaves to the second
_SMALLEST = 2.0**-100  # inputs that are all smaller lose precision


class Octets(Kernel):
    """W = values * scale: the values as they are, the scales in float32."""

    device: ClassVar[str] = "cuda"
    step: ClassVar[int]  # widths are multiples of this

    def __init__(
        self, scheme: Scheme, rows: int, columns: int, scale_dtype: torch.dtype, few: int, tensors: dict[str, Tensor]
    ) -> None:
        super().__init__(scheme, rows, columns, scale_dtype, few, tensors)
        self._weight = tensors["weight"].view(torch.int8 if scheme.type == "int" else FLOAT8)
        self._scale = tensors["scales"].view(torch.float32)

    @classmethod
    def refuses(cls, scheme: Scheme, rows: int, columns: int, device: torch.device) -> str | None:
        alike = (scheme.type, scheme.activation_bits) == (cls.example.type, cls.example.activation_bits)
        if not alike or scheme.strategy != "channel":
            return f"takes {cls.example.name}"
        if rows % cls.step or columns % cls.step:
            return f"takes widths in multiples of {cls.step}, not {rows} and {columns}"
        return None if cls.works(device) else f"{device.type} has no such product, or not an exact one"

    @classmethod
    @abstractmethod
    def works(cls, device: torch.device) -> bool:
        """Whether the device has the product: found by trying."""

    @classmethod
    def pack(cls, values: Tensor, grid: Grid, few: int) -> Self:
        rows, columns = values.shape
        return cls(grid.scheme, rows, columns, grid.scale.dtype, few, cls._tensors(values, grid))

    @classmethod
    def _tensors(cls, values: Tensor, grid: Grid) -> dict[str, Tensor]:
        scale = grid.scale.view(-1).float().contiguous()
        return {"weight": values.contiguous().view(torch.uint8), "scales": scale.view(torch.int32)}

    def values(self, rows: Tensor | None = None) -> Tensor:
        return some(self._weight.view(torch.uint8), rows).view(self._weight.dtype)

    def scale(self, rows: Tensor | None = None) -> Tensor:
        return some(self._scale, rows).to(self.scale_dtype).view(-1, 1)

    def unpacked(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        exact = dtype == self.scale_dtype == torch.bfloat16  # the product of both is rounded once, like that of floats
        wide = dtype if exact else torch.promote_types(dtype, torch.float32)
        return (self._weight[start:stop].to(wide) * self._scale[start:stop, None].to(wide)).to(dtype).T


class Float8(Octets):
    """FP8A16 by the product of two float8 matrices (`_scaled_mm`): every input goes in as the sum of two float8 values.

    A float8_e4m3fn has 4 significant bits, a bfloat16 has 8: with scales that are powers of two the sum is the bfloat16
    itself, unless it is more than 2^13 times smaller than its token's largest. So nothing is rounded that FP8A16 does
    not round.
    """

    name: ClassVar[str] = "float8"
    example: ClassVar[Scheme] = Scheme(8, True, "channel", None, "float")
    step: ClassVar[int] = 16

    @classmethod
    def works(cls, device: torch.device) -> bool:
        return multiplies_float8(device)

    def few_rows(self, tokens: Tensor) -> Tensor:
        both = float8_product(*as_two_float8(tokens), self._weight, self._scale)
        return both[: len(tokens)] + both[len(tokens) :]


class Int8Tokens(Octets):
    """W8A8: see `int8_linear`; the sums of the weight's rows, which zero points are multiplied with, are kept."""

    name: ClassVar[str] = "int8 with rounded inputs"
    example: ClassVar[Scheme] = Scheme(8, True, "channel", None, "int", 8)
    always: ClassVar[bool] = True
    step: ClassVar[int] = 8

    @classmethod
    def works(cls, device: torch.device) -> bool:
        return bool(multiplies_int8(device))

    @classmethod
    def _tensors(cls, values: Tensor, grid: Grid) -> dict[str, Tensor]:
        return super()._tensors(values, grid) | {"sums": values.sum(1, dtype=torch.int32)}

    def linear(self, input: Tensor, bias: Tensor | None) -> Tensor:
        symmetric = self.scheme.activation_symmetric
        return int8_linear(input, self._weight, self._scale, bias, symmetric=symmetric, sums=self.tensors["sums"])

    def few_rows(self, tokens: Tensor) -> Tensor:
        return self.linear(tokens, None)


def as_two_float8(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Every value as the sum of two float8_e4m3fn values, each times its row's scale.

    Args:
        tokens: bfloat16 (n, columns).

    Returns:
        float8_e4m3fn (2 n, columns), the first summands above the second ones, and float32 (2 n, 1), powers of two.
    """
    size = tokens.abs().amax(1, keepdim=True).float()
    power = (size.view(torch.int32) & _EXPONENT).view(torch.float32)
    scale = power.clamp_min(_SMALLEST) / _LARGEST
    wide = tokens / scale
    first = wide.to(FLOAT8)
    second = ((wide - first.float()) * _FINER).to(FLOAT8)
    both = torch.cat([first.view(torch.uint8), second.view(torch.uint8)]).view(FLOAT8)
    return both, torch.cat([scale, scale / _FINER])


def float8_product(values: Tensor, scales: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """bfloat16 (n, out) of float8_e4m3fn (n, in) with float32 (n, 1), and (out, in) with float32 (out,)."""
    return torch._scaled_mm(
        values, weight.T, scale_a=scales, scale_b=scale.view(1, -1), out_dtype=torch.bfloat16, use_fast_accum=False
    )


@cache
def multiplies_float8(device: torch.device) -> bool:
    """Whether `torch._scaled_mm` is there on a device with a scale for each row, and right: found by trying."""
    generator = torch.Generator().manual_seed(0)
    values, weight = (torch.randn(size, 64, generator=generator).to(FLOAT8) for size in (6, 32))
    scales, scale = (torch.rand(size, generator=generator) + 0.5 for size in (6, 32))
    wanted = (values.float() * scales[:, None]) @ (weight.float() * scale[:, None]).T
    try:
        found = float8_product(values.to(device), scales[:, None].to(device), weight.to(device), scale.to(device))
    except (RuntimeError, ValueError):
        return False
    return torch.allclose(found.cpu().float(), wanted, rtol=0.01, atol=0.01)
