"""What a weight has beside it while it is trained for few bits: the steps that are learned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_shrink.ops.grid import Grid, quantize
from hf_shrink.ops.quantized import QuantizedWeight
from hf_shrink.scheme import Scheme
from hf_shrink.training.qat.int8 import rounded_linear
from hf_shrink.training.qat.lsq import fake_quantize, idle, step_grid


@dataclass(frozen=True)
class Start:
    """Where a weight starts to be trained for few bits.

    Attributes:
        grid: its first scales and zero points.
        size: the root mean square of the weight; 1 where that is 0.
        correction: what has to be added to the weight (out_features, in_features), so that rounding it to nearest gives
            the integers of the method (GPTQ rounds elsewhere to make up for the errors of others); None: nothing.
    """

    grid: Grid
    size: float
    correction: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, found: QuantizedWeight) -> Start:
        """From what a method made of the weight (out_features, in_features)."""
        elsewhere = quantize(weight, found.grid) != found.values
        correction = None
        if elsewhere.any():
            correction = torch.where(elsewhere, found.dequantized() - weight.float(), 0.0)
        size = float(weight.detach().float().square().mean().sqrt())
        return cls(found.grid, size or 1.0, correction)


class WeightQuantizer(nn.Module):
    """The grid of one weight (out_features, in_features) in training. Called with the weight, gives it as stored.

    Until `begin` it gives the weight as it is. A state dict holds all that `begin` chose, so that a checkpoint of a
    model in training continues where it was.

    Attributes:
        step: float32 parameter (rows, groups): the scales, in units in which they start as large as the weights are
            (their root mean square). See `lsq.fake_quantize`.
        unit: float32 (rows, groups), the scale that a step of 1 is; zeros until `begin`.
        zero_point: int8 (rows, groups); None for symmetric schemes. It stays where the start put it.
        scheme: with a group size that divides in_features.
        scale_dtype: that the scales will be stored in.
        active: whether the weight is rounded by now.
    """

    unit: Tensor
    zero_point: Tensor | None

    def __init__(
        self, scheme: Scheme, rows: int, columns: int, scale_dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.scheme = scheme.for_width(columns)
        self.scale_dtype = scale_dtype
        self.active = False
        shape = (1 if scheme.strategy == "tensor" else rows, self.scheme.scale_columns(columns))
        self.step = nn.Parameter(torch.ones(shape, device=device))
        self.register_buffer("unit", torch.zeros(shape, device=device))
        zero_point = None if scheme.symmetric else torch.zeros(shape, dtype=torch.int8, device=device)
        self.register_buffer("zero_point", zero_point)

    @property
    def begun(self) -> bool:
        """Whether the steps, as they are here or were loaded, are those of a grid."""
        return bool(self.unit.any())

    def begin(self, start: Start) -> None:
        """Round from now on, at first on the grid of `start`."""
        with torch.no_grad():
            self.unit.copy_(start.grid.scale.float() / start.size)
            self.step.fill_(start.size)
            if self.zero_point is not None and start.grid.zero_point is not None:
                self.zero_point.copy_(start.grid.zero_point)
        self.active = True

    def grid(self) -> Grid:
        """The grid as it is now, with the scales as they will be stored."""
        return step_grid(self.scheme, self.step.detach(), self.unit, self.zero_point, self.scale_dtype)

    def forward(self, weight: Tensor) -> Tensor:
        """(out_features, in_features) to the same, in its dtype."""
        if not self.active:
            return idle(weight, self.step)
        return fake_quantize(weight, self.step, self.unit, self.zero_point, self.scheme, self.scale_dtype)

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + b as the packed module will compute it: W8A8 rounds x too."""
        fake = self(weight)
        if not self.active or self.scheme.activation_bits == 16:
            return F.linear(input, fake, bias)
        return rounded_linear(input, fake, bias, self.quantized(weight))

    def quantized(self, weight: Tensor, *, sparse: bool = False) -> QuantizedWeight:
        """The weight as it is computed with now, to be packed: bit for bit what `forward` gives.

        Args:
            sparse: it was pruned, and its zeros are to stay zeros; as every grid has zero, they are.
        """
        with torch.no_grad():
            grid = self.grid()
            return QuantizedWeight(quantize(weight, grid), grid, 0.0, sparse=sparse)

    def extra_repr(self) -> str:
        """For print(model)."""
        size = f" g{self.scheme.group_size}" if self.scheme.group_size else f" per {self.scheme.strategy}"
        return f"{self.scheme.name}{size}, {'active' if self.active else 'waiting'}"
