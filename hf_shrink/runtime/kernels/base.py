"""What every kernel is to a packed module: the weight in one layout, its products, and the way back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from hf_shrink.ops.grid import Grid
from hf_shrink.scheme import Scheme


class Kernel(ABC):
    """A weight (rows, columns) in the layout of one of torch's kernels.

    Kernels are made once and only read afterwards; what can be settled before a product is settled then.

    Attributes:
        name: for people.
        scheme, rows, columns: of the weight.
        scale_dtype: of the scales as they are stored.
        few: up to so many rows of input the kernel multiplies; above, blocks of the weight are unpacked (`blocks.py`).
        tensors: what is held. None is of a floating dtype, so that casts of the module leave them alone.
    """

    name: ClassVar[str]

    def __init__(
        self, scheme: Scheme, rows: int, columns: int, scale_dtype: torch.dtype, few: int, tensors: dict[str, Tensor]
    ) -> None:
        self.scheme, self.rows, self.columns = scheme, rows, columns
        self.scale_dtype, self.few, self.tensors = scale_dtype, few, tensors

    def with_tensors(self, tensors: dict[str, Tensor]) -> Self:
        """The same kernel on other tensors: copies, or moved ones."""
        return type(self)(self.scheme, self.rows, self.columns, self.scale_dtype, self.few, tensors)

    def __reduce__(self) -> tuple[Any, ...]:
        # Views of the tensors in another dtype cannot be pickled beside them.
        return type(self), (self.scheme, self.rows, self.columns, self.scale_dtype, self.few, self.tensors)

    @classmethod
    @abstractmethod
    def refuses(cls, scheme: Scheme, rows: int, columns: int, device: torch.device) -> str | None:
        """Why a weight cannot be held so; None when it can."""

    @classmethod
    @abstractmethod
    def pack(cls, values: Tensor, grid: Grid, few: int) -> Self:
        """From a weight's integers (rows, columns) and their grid."""

    @abstractmethod
    def values(self) -> Tensor:
        """int8 (rows, columns): the integers that were packed."""

    @abstractmethod
    def scale(self) -> Tensor:
        """The scales as they are stored, bit for bit."""

    @abstractmethod
    def linear(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + b on (..., columns), in the dtype of the input. Records no gradients."""

    @abstractmethod
    def unpacked(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """(columns, stop - start): rows of the weight, transposed, as the kernel computes with them.

        `start` is a multiple of 64.
        """
