"""The product of W8A8 while it is trained: computed on integers, as the packed module will, to the last bit.

Otherwise what is rounded in the next layer would now and then fall on the other side of a tie.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_shrink.ops.quantized import QuantizedWeight
from hf_shrink.runtime.int8 import int8_linear, quantize_tokens


def rounded_linear(input: Tensor, fake: Tensor, bias: Tensor | None, stored: QuantizedWeight) -> Tensor:
    """x W^T + b with x and W rounded. Gradients of x pass through its rounding.

    Args:
        input: (..., in_features), any float dtype.
        fake: (out_features, in_features), what `stored` stands for; gets the gradient of W.
        bias: (out_features,) or None.
        stored: under W8A8.
    """
    if bias is not None:
        bias = bias.to(input.dtype)
    output: Tensor = _Product.apply(input, fake, bias, stored)  # type: ignore[no-untyped-call]
    return output


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, fake: Tensor, bias: Tensor | None, stored: QuantizedWeight) -> Tensor:
        ctx.save_for_backward(input, fake)
        ctx.symmetric = stored.grid.scheme.activation_symmetric
        return int8_linear(input, stored.values, stored.grid.scale, bias, symmetric=ctx.symmetric)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        input, fake = ctx.saved_tensors
        needs_input, needs_weight, needs_bias, _ = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        to_input = to_weight = to_bias = None
        if needs_input:
            to_input = (gradient @ fake.to(gradient.dtype)).to(input.dtype)
        if needs_weight:
            rounded = quantize_tokens(input, ctx.symmetric).rounded().reshape(-1, input.shape[-1])
            to_weight = (rows.T @ rounded.to(gradient.dtype)).to(fake.dtype)
        if needs_bias:
            to_bias = rows.sum(0).to(input.dtype)
        return to_input, to_weight, to_bias, None
