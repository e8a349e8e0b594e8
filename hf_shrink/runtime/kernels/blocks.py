"""Products that unpack the weight block by block: for many rows of input, and for gradients.

On a CPU an unpacked block stays in the cache while it is multiplied, and nothing of the weight's size is ever made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_shrink.ops.at_once import at_once

if TYPE_CHECKING:
    from hf_shrink.runtime.kernels.base import Kernel

_BLOCK_VALUES = 1 << 20  # unpacked at once on a CPU: enough for the calls not to count
_STEP = 64  # rows of the weight: whole blocks of every kernel's layout


def blockwise_linear(kernel: Kernel, input: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b on (..., columns), in the dtype of the input.

    Computed in float32 or float64 at least, in bfloat16 for inputs of that dtype where it is native: what a Linear
    with the dense weight would give.
    """
    fast = input.dtype == torch.bfloat16 and kernel.bfloat16_native
    compute = input.dtype if fast else torch.promote_types(input.dtype, torch.float32)
    tokens = input.reshape(-1, kernel.columns).to(compute)
    parts = [tokens @ kernel.unpacked(start, stop, compute) for start, stop in _row_blocks(kernel)]
    output = (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).to(input.dtype)
    if bias is not None:
        output = output + bias.to(input.dtype)
    return output.view((*input.shape[:-1], kernel.rows))


def blockwise_gradient(kernel: Kernel, gradient: Tensor) -> Tensor:
    """(..., rows) times the weight: (..., columns), in the dtype of the gradient; computed in float32 at least."""
    compute = torch.promote_types(gradient.dtype, torch.float32)
    tokens = gradient.reshape(-1, kernel.rows).to(compute)
    output = tokens.new_zeros(len(tokens), kernel.columns)
    for start, stop in _row_blocks(kernel):
        output.addmm_(tokens[:, start:stop], kernel.unpacked(start, stop, compute).T)
    return output.to(gradient.dtype).view((*gradient.shape[:-1], kernel.columns))


def _row_blocks(kernel: Kernel) -> list[tuple[int, int]]:
    values = at_once(kernel.tensors["weight"].device, _BLOCK_VALUES)
    step = max(1, values // (_STEP * kernel.columns)) * _STEP
    return [(start, min(start + step, kernel.rows)) for start in range(0, kernel.rows, step)]
