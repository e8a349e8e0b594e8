"""Dense copies of packed weights while a model is measured: unpacked once, not in every window."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_shrink.evaluation.machine import available_bytes
from hf_shrink.residence import residence_of
from hf_shrink.runtime.kernels.base import Kernel
from hf_shrink.runtime.linear import CompressedLinear
from hf_shrink.runtime.unpacked import kept_dense

SHARE = 0.5  # of the memory that is free
_VALUES, _STEP = 1 << 20, 64  # unpacked at once, in whole blocks of the kernels' layouts


@contextmanager
def dense_copies(models: Sequence[nn.Module], limit: int | None = None, processes: int = 1) -> Iterator[None]:
    """Let packed Linears on the CPU multiply many rows by a dense copy of their weight, as long as memory lasts.

    What they give stays as it is: few rows go to the kernel as before, and many are multiplied in the dtype in which
    the weight would have been unpacked for them. Models whose weights come and go with their blocks get no copies.

    Args:
        limit: bytes of all copies together; None: half of the memory that is free, none where that is unknown.
        processes: how many do the same on this machine, and share that.
    """
    left = int(SHARE * (available_bytes() or 0)) // processes if limit is None else limit
    with ExitStack() as given:
        for model in models:
            residence = residence_of(model)
            if residence is not None and residence.rests:
                continue
            for linear in model.modules():
                # Of weights that several share (a head and an embedding) only the Linear multiplies.
                if type(linear) is not CompressedLinear or linear.device.type != "cpu" or "forward" in vars(linear):
                    continue
                kernel = linear.kernel
                dtype = linear.weight_dtype if kernel is None else _wide(linear.weight_dtype, kernel)
                needed = linear.numel * dtype.itemsize
                if needed > left or (kernel is None and not linear.unpacks):
                    continue
                left -= needed
                given.enter_context(kept_dense(linear) if kernel is None else _in_place_of(linear, kernel, dtype))
        yield


@contextmanager
def _in_place_of(linear: CompressedLinear, kernel: Kernel, dtype: torch.dtype) -> Iterator[None]:
    """Multiply inputs with more rows than the kernel takes by a copy of the weight, made for the first of them."""
    vars(linear)["forward"] = _forward(linear, kernel, dtype)
    try:
        yield
    finally:
        del vars(linear)["forward"]


def _forward(linear: CompressedLinear, kernel: Kernel, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    copy: Tensor | None = None
    few = kernel.few * kernel.columns

    def forward(input: Tensor) -> Tensor:
        nonlocal copy
        apart = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or _wide(input.dtype, kernel) != dtype
        if apart or input.numel() <= few:
            return CompressedLinear.forward(linear, input)
        if copy is None:
            copy = _unpacked(kernel, dtype)
        if dtype == input.dtype:
            return F.linear(input, copy, None if linear.bias is None else linear.bias.to(dtype))
        # In the kernel's order: rounded to the input's dtype before the bias.
        output = F.linear(input.to(dtype), copy).to(input.dtype)
        return output if linear.bias is None else output + linear.bias.to(input.dtype)

    return forward


def _wide(dtype: torch.dtype, kernel: Kernel) -> torch.dtype:
    """The dtype in which a kernel multiplies many rows of this dtype."""
    if dtype == torch.bfloat16 and kernel.bfloat16_native:
        return dtype
    return torch.promote_types(dtype, torch.float32)


def _unpacked(kernel: Kernel, dtype: torch.dtype) -> Tensor:
    """The whole weight, (rows, columns)."""
    weight = torch.empty(kernel.rows, kernel.columns, dtype=dtype)
    step = max(1, _VALUES // (_STEP * kernel.columns)) * _STEP
    for start in range(0, kernel.rows, step):
        stop = min(start + step, kernel.rows)
        weight[start:stop] = kernel.unpacked(start, stop, dtype).T
    return weight
