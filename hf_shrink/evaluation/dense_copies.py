"""Dense copies of packed weights while a model is measured: unpacked once, not in every window."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_shrink.evaluation.machine import available_bytes
from hf_shrink.residence import residence_of
from hf_shrink.runtime.linear import CompressedLinear

SHARE = 0.5  # of the memory that is free
_VALUES, _STEP = 1 << 20, 64  # unpacked at once, in whole blocks of the kernels' layouts


@contextmanager
def dense_copies(models: Sequence[nn.Module], limit: int | None = None) -> Iterator[None]:
    """Let packed Linears multiply many rows by a dense copy of their weight, as long as memory lasts.

    What they give stays as it is: few rows go to the kernel as before, and many are multiplied in the dtype in which
    the weight would have been unpacked for them. A copy is made when it is first needed and is gone afterwards.
    Models whose weights come and go with their blocks get none, nor do Linears that round their inputs, or those that
    are on an accelerator.

    Args:
        limit: bytes of all copies together; None: half of the memory that is free, none where that is unknown.
    """
    if limit is None:
        limit = int(SHARE * (available_bytes() or 0))
    copies = _Copies(limit)
    given: list[CompressedLinear] = []
    try:
        for model in models:
            residence = residence_of(model)
            if residence is not None and residence.rests:
                continue
            for module in model.modules():
                if _can_have_one(module) and "forward" not in vars(module):
                    vars(module)["forward"] = copies.forward_of(module)
                    given.append(module)
        yield
    finally:
        for module in given:
            del vars(module)["forward"]


def _can_have_one(module: nn.Module) -> TypeGuard[CompressedLinear]:
    if type(module) is not CompressedLinear or module.device.type != "cpu":
        return False
    return module.scheme.activation_bits > 8 or module.kernel is not None


class _Copies:
    """Copies of weights, one of each that is held, in at most `left` bytes."""

    def __init__(self, left: int) -> None:
        self._left = left
        self._made: dict[tuple[int, torch.dtype], Tensor] = {}

    def forward_of(self, linear: CompressedLinear) -> Callable[[Tensor], Tensor]:
        """What the Linear's forward does, with a copy of the weight where it may have one."""

        def forward(input: Tensor) -> Tensor:
            kernel = linear.kernel
            few = 0 if kernel is None else kernel.few * kernel.columns
            plain = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
            if plain and input.numel() > few:
                weight = self._copy(linear, _product_dtype(linear, input.dtype))
                if weight is not None:
                    return _product(input, weight, linear.bias)
            return CompressedLinear.forward(linear, input)

        return forward

    def _copy(self, linear: CompressedLinear, dtype: torch.dtype) -> Tensor | None:
        key = linear.held.data_ptr(), dtype
        if key not in self._made:
            needed = linear.numel * dtype.itemsize
            if needed > self._left:
                return None
            self._left -= needed
            self._made[key] = _unpacked(linear, dtype)
        return self._made[key]


def _product_dtype(linear: CompressedLinear, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the Linear multiplies many rows of this dtype."""
    kernel = linear.kernel
    if kernel is None or (dtype == torch.bfloat16 and kernel.bfloat16_native):
        return dtype
    return torch.promote_types(dtype, torch.float32)


def _unpacked(linear: CompressedLinear, dtype: torch.dtype) -> Tensor:
    kernel: Any = linear.kernel
    if kernel is None:
        return linear.weight.to(dtype)
    weight = torch.empty(kernel.rows, kernel.columns, dtype=dtype)
    step = max(1, _VALUES // (_STEP * kernel.columns)) * _STEP
    for start in range(0, kernel.rows, step):
        stop = min(start + step, kernel.rows)
        weight[start:stop] = kernel.unpacked(start, stop, dtype).T
    return weight


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In the order of `CompressedLinear`: multiplied in the weight's dtype, then rounded, then the bias."""
    if weight.dtype == input.dtype:
        return F.linear(input, weight, None if bias is None else bias.to(input.dtype))
    output = F.linear(input.to(weight.dtype), weight).to(input.dtype)
    return output if bias is None else output + bias.to(input.dtype)
