"""What a weight has beside it while it is trained for few bits: the steps that are learned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_shrink.ops.grid import Grid, quantize
from hf_shrink.ops.quantized import QuantizedWeight
from hf_shrink.scheme import Scheme
from hf_shrink.training.qat.int8 import rounded_linear
from hf_shrink.training.qat.lsq import fake_quantize, idle, step_grid

SMALLEST_GROUP = 32  # that there is room for where inputs of a weight will go


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
        kept: int64, the inputs that will be left of the weight, ascending; None: all. Groups are made of these alone,
            the columns of the others are zero, and the last steps may be unused.
        active: whether the weight is rounded by now.
    """

    scheme: Scheme
    kept: Tensor | None
    active: bool
    unit: Tensor
    zero_point: Tensor | None

    def __init__(
        self,
        scheme: Scheme,
        rows: int,
        columns: int,
        scale_dtype: torch.dtype,
        device: torch.device | None = None,
        *,
        loses_inputs: bool = False,
    ) -> None:
        """
        Args:
            loses_inputs: whether `keep` may be called: makes room for the groups of what is left.
        """
        super().__init__()
        self._whole = scheme.for_width(columns)
        self.scale_dtype = scale_dtype
        self.reset()
        groups = self.scheme.scale_columns(columns)
        if loses_inputs and scheme.group_size is not None:
            groups = max(groups, columns // SMALLEST_GROUP)
        shape = (1 if scheme.strategy == "tensor" else rows, groups)
        self.step = nn.Parameter(torch.ones(shape, device=device))
        self.register_buffer("unit", torch.zeros(shape, device=device))
        zero_point = None if scheme.symmetric else torch.zeros(shape, dtype=torch.int8, device=device)
        self.register_buffer("zero_point", zero_point)

    @property
    def begun(self) -> bool:
        """Whether the steps, as they are here or were loaded, are those of a grid."""
        return bool(self.unit.any())

    def reset(self) -> None:
        """Wait for `begin`, with all inputs."""
        self.active = False
        self.scheme, self.kept = self._whole, None

    def forget(self) -> None:
        """There is no grid, not of an earlier training of this model that was given up either."""
        self.unit.zero_()

    def keep(self, inputs: Tensor) -> None:
        """Make groups of these inputs alone, ascending, from before `begin` on; the others will be cut.

        The group size is what `Scheme.for_width` says; where that makes more groups than there is room for, the
        smallest that does not.
        """
        count = len(inputs)
        if self.scheme.group_size is None:
            return
        asked, room = self._whole.for_width(count), self.step.shape[1]
        if asked.scale_columns(count) > room:
            size = next(d for d in range(1, count + 1) if count % d == 0 and count // d <= room)
            asked = replace(asked, group_size=size)
        self.scheme, self.kept = asked, inputs.to(self.unit.device)

    def cut(self, rows: Tensor | None) -> None:
        """The weight has lost the inputs that are not kept, and of its rows all but these (None: none)."""
        used = self._used()
        chosen: Any = slice(None) if rows is None or self.scheme.strategy == "tensor" else rows.to(self.unit.device)
        self.step = nn.Parameter(self.step.detach()[chosen, :used])
        self.unit = self.unit[chosen, :used]
        self.zero_point = None if self.zero_point is None else self.zero_point[chosen, :used].contiguous()
        self._whole, self.kept = self.scheme, None

    def left(self, weight: Tensor) -> Tensor:
        """The columns of a weight (out_features, in_features) that have groups."""
        return weight if self.kept is None else weight.index_select(1, self.kept)

    def begin(self, start: Start) -> None:
        """Round from now on, at first on the grid of `start`, which is one of what is `left`."""
        used = self._used()
        with torch.no_grad():
            self.unit.fill_(1.0)
            self.unit[:, :used] = start.grid.scale.float() / start.size
            self.step.fill_(start.size)
            if self.zero_point is not None and start.grid.zero_point is not None:
                self.zero_point[:, :used] = start.grid.zero_point
        self.active = True

    def grid(self) -> Grid:
        """The grid of what is `left`, as it is now, with the scales as they will be stored."""
        step, unit, zero_point = self._of_groups()
        return step_grid(self.scheme, step.detach(), unit, zero_point, self.scale_dtype)

    def forward(self, weight: Tensor) -> Tensor:
        """(out_features, in_features) to the same, in its dtype."""
        if not self.active:
            return idle(weight, self.step)
        fake = fake_quantize(self.left(weight), *self._of_groups(), self.scheme, self.scale_dtype)
        return fake if self.kept is None else torch.zeros_like(weight).index_copy(1, self.kept, fake)

    def _used(self) -> int:
        """How many columns of steps are those of groups."""
        return self.step.shape[1] if self.kept is None else self.scheme.scale_columns(len(self.kept))

    def _of_groups(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Steps, units and zero points."""
        if self.kept is None:
            return self.step, self.unit, self.zero_point
        used = self._used()
        zero_point = None if self.zero_point is None else self.zero_point[:, :used].contiguous()
        return self.step[:, :used], self.unit[:, :used], zero_point

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + b as the packed module will compute it: W8A8 rounds x too."""
        fake = self(weight)
        if not self.active or self.scheme.activation_bits == 16:
            return F.linear(input, fake, bias)
        return rounded_linear(input, fake, bias, self.quantized(weight))

    def quantized(self, weight: Tensor, *, sparse: bool = False) -> QuantizedWeight:
        """The weight, once it is cut, as it is computed with now, to be packed: bit for bit what `forward` gives.

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
