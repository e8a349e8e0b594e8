"""A Linear whose weight stays packed: unpacked for one product at a time, in the forward and in the backward pass.

Under W8A8 the forward pass multiplies the int8 weight as it is.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_shrink.ops.quantized import QuantizedWeight
from hf_shrink.plan import Scheme
from hf_shrink.runtime.int8 import int8_linear
from hf_shrink.runtime.kernels import kernel_for
from hf_shrink.runtime.kernels.blocks import blockwise_gradient
from hf_shrink.runtime.kernels.crossover import few_limit
from hf_shrink.runtime.packed import PackedModule


class CompressedLinear(PackedModule):
    """y = x W^T + b with W packed. Its state dict is what a compressed-tensors checkpoint holds for a Linear.

    With 8-bit activations x is rounded to int8 first, with a scale for each token.

    Attributes:
        in_features, out_features: as of nn.Linear.
        bias: parameter (out_features,) or None.
    """

    multiplies: ClassVar[bool] = True

    def __init__(
        self,
        scheme: Scheme,
        in_features: int,
        out_features: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(scheme, out_features, in_features, dtype, device)
        self.in_features, self.out_features = in_features, out_features
        zeros = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros))

    @classmethod
    def empty(
        cls,
        scheme: Scheme,
        in_features: int,
        out_features: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> CompressedLinear:
        """All zeros (or meta tensors), to load a state dict into. `dtype`: of the scales, the bias and `weight`."""
        return cls(scheme, in_features, out_features, bias, dtype, device)

    @classmethod
    def from_quantized(cls, quantized: QuantizedWeight, bias: Tensor | None) -> CompressedLinear:
        """From a method's result. The bias is taken over as it is."""
        rows, columns = quantized.values.shape
        grid = quantized.grid
        linear = cls(grid.scheme, columns, rows, False, grid.scale.dtype, "meta")
        linear._fill(quantized)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
        return linear

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Linear, on (..., in_features), in the dtype of the input. Gradients reach the input and the bias.

        Rounding of the input passes gradients through as if it were not there.
        """
        bias = self._parameters["bias"]  # this runs for every Linear of every token: the short way
        if torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad)):
            output: Tensor = _PackedProduct.apply(input, bias, self)  # type: ignore[no-untyped-call]
            return output
        return self._product(input, bias)

    def optimize(self) -> None:
        """See `PackedModule.optimize`."""
        self.optimized = True
        self._restore()
        rows, columns, device = self.out_features, self.in_features, self.device
        kind, self.kernel_note = kernel_for(self.scheme, rows, columns, device, self.scale_dtype)
        if kind is not None:
            few = few_limit(kind, self.numel, self.scale_dtype, device)
            self.use_kernel(kind.pack(*self.unpacked(), few))
        else:
            self._pass_on()

    def _product(self, input: Tensor, bias: Tensor | None) -> Tensor:
        if self.kernel is not None:
            return self.kernel.linear(input, bias)
        if bias is not None and bias.dtype != input.dtype:
            bias = bias.to(input.dtype)
        if self.scheme.activation_bits == 8:
            symmetric = self.scheme.activation_symmetric
            return int8_linear(input, self.weight_packed, self.weight_scale, bias, symmetric=symmetric)
        return F.linear(input, self.weight.to(input.dtype), bias)

    def _input_gradient(self, gradient: Tensor) -> Tensor:
        if self.kernel is not None:
            return blockwise_gradient(self.kernel, gradient)
        return gradient @ self.weight.to(gradient.dtype)

    def extra_repr(self) -> str:
        """For print(model)."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {self._describe()}"


class _PackedProduct(torch.autograd.Function):
    """F.linear that unpacks the weight again for the backward pass instead of keeping a dense copy in the graph."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor | None, linear: CompressedLinear) -> Tensor:
        ctx.linear = linear
        ctx.dtype, ctx.bias_dtype = input.dtype, None if bias is None else bias.dtype
        return linear._product(input, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        needs_input, needs_bias, _ = ctx.needs_input_grad
        to_input = to_bias = None
        if needs_input:
            to_input = ctx.linear._input_gradient(gradient).to(ctx.dtype)
        if needs_bias:
            to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0).to(ctx.bias_dtype)
        return to_input, to_bias, None
