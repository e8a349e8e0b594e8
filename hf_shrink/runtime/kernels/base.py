"""What every kernel is to a packed module: the weight in one layout, its product, and the way back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from hf_shrink.errors import ShrinkError
from hf_shrink.ops.grid import Grid
from hf_shrink.ops.precision import multiplies_bfloat16
from hf_shrink.runtime.kernels.blocks import blockwise_linear
from hf_shrink.scheme import Scheme


class Kernel(ABC):
    """A weight (rows, columns) in the layout of one of torch's kernels for one kind of device.

    Kernels are made once and only read afterwards; what can be settled before a product is settled then.

    Attributes:
        name: for people.
        example: a scheme that the kernel takes.
        device: the type of device that it is for.
        always: whether it multiplies any number of rows: there is nothing to weigh it against.
        scheme, rows, columns: of the weight.
        scale_dtype: of the scales as they are stored.
        few: up to so many rows of input the kernel multiplies; above, blocks of the weight are unpacked (`blocks.py`).
        bfloat16_native: whether the device multiplies bfloat16 natively.
        tensors: what is held. None is of a floating dtype, so that casts of the module leave them alone.
    """

    name: ClassVar[str]
    example: ClassVar[Scheme]
    device: ClassVar[str]
    always: ClassVar[bool] = False

    def __init__(
        self, scheme: Scheme, rows: int, columns: int, scale_dtype: torch.dtype, few: int, tensors: dict[str, Tensor]
    ) -> None:
        self.scheme, self.rows, self.columns = scheme, rows, columns
        self.scale_dtype, self.few, self.tensors = scale_dtype, few, tensors
        self._few_values = few * columns
        self.bfloat16_native = multiplies_bfloat16(tensors["weight"].device)

    def with_tensors(self, tensors: dict[str, Tensor]) -> Self:
        """The same kernel on other tensors: copies, or moved ones."""
        return type(self)(self.scheme, self.rows, self.columns, self.scale_dtype, self.few, tensors)

    def __reduce__(self) -> tuple[Any, ...]:
        # Views of the tensors in another dtype cannot be pickled beside them.
        parts = (self.scheme, self.rows, self.columns, self.scale_dtype, self.few, self.tensors)
        return _unpickled, (type(self), self.tensors["weight"].device.type, self.blocks(), parts)

    @classmethod
    def blocks(cls) -> tuple[Any, ...] | None:
        """How rows lie in the kernel's blocks, where that is not the same on every device of its kind."""
        return None

    @classmethod
    @abstractmethod
    def refuses(cls, scheme: Scheme, rows: int, columns: int, device: torch.device) -> str | None:
        """Why a weight cannot be held so; None when it can."""

    @classmethod
    @abstractmethod
    def pack(cls, values: Tensor, grid: Grid, few: int) -> Self:
        """From a weight's values (rows, columns), int8 or float8_e4m3fn, and their grid."""

    @abstractmethod
    def values(self, rows: Tensor | None = None) -> Tensor:
        """int8 or float8_e4m3fn (rows, columns): what was packed, of all rows or those of the given numbers."""

    @abstractmethod
    def scale(self, rows: Tensor | None = None) -> Tensor:
        """The scales as they are stored, bit for bit: all of them, or those of some rows."""

    @abstractmethod
    def few_rows(self, tokens: Tensor) -> Tensor:
        """bfloat16 (n, rows) from (n, columns), both contiguous, n > 0: the kernel's product."""

    @abstractmethod
    def unpacked(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """(columns, stop - start): rows of the weight, transposed, as the kernel computes with them.

        `start` is a multiple of 64.
        """

    def linear(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + b on (..., columns), in the dtype of the input or autocast's. Records no gradients."""
        if input.dtype is not torch.bfloat16:
            return self._linear_of_others(input, bias)
        if not 0 < input.numel() <= self._few_values:
            return blockwise_linear(self, input, bias)
        output = self.few_rows(input.reshape(-1, self.columns).contiguous())
        if bias is not None:
            output = output + bias.to(torch.bfloat16)
        return output.view((*input.shape[:-1], self.rows))

    def _linear_of_others(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """Few tokens are rounded to bfloat16, float64 ones excepted; their outputs are in the input's dtype again."""
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        if input.dtype is torch.float64 or not 0 < input.numel() <= self._few_values:
            return blockwise_linear(self, input.to(dtype), bias)
        tokens = input.reshape(-1, self.columns).to(torch.bfloat16).contiguous()
        output = self.few_rows(tokens).to(dtype)
        if bias is not None:
            output += bias
        return output.view((*input.shape[:-1], self.rows))


def _unpickled(kind: type[Kernel], device: str, blocks: tuple[Any, ...] | None, parts: tuple[Any, ...]) -> Kernel:
    """A pickled kernel, or a copy. Raises ShrinkError where its tensors mean something else than where it was made."""
    here = parts[-1]["weight"].device.type
    if here != "meta" and (here, kind.blocks()) != (device, blocks):
        raise ShrinkError(
            f"this model was pickled with its weights in the layout of {kind.name!r} for {device} (blocks: {blocks}), "
            f"and here is {here} (blocks: {kind.blocks()}), which would multiply them wrongly; save it with "
            "save_pretrained, or call hf_shrink.runtime.optimizing.restore_layout(model) before it is pickled"
        )
    return kind(*parts)
