"""A weight and its grid laid out for solvers that go column by column: one column is one contiguous row."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_shrink.ops.grid import Grid, nearest_, value_dtype

# Output features are padded to whole cache lines: each then takes the same vectorised path, so that a row's result does
# not depend on the rows it is solved with.
ROW_MULTIPLE = 16


class GridColumns:
    """The columns of a grid in a given order.

    Values are held as *steps*: float32 (in_features, padded out_features) of q - zero_point, so that a weight is
    steps * scale.

    Args:
        grid: of a weight with `out_features` rows.
        order: (in_features,) the columns, in the order in which they are addressed.
    """

    def __init__(self, grid: Grid, out_features: int, order: Tensor) -> None:
        self.grid = grid
        self.out_features = out_features
        self.order = order
        self.group_of = (order // (grid.scheme.group_size or len(order))).tolist()
        self.scale = self._spread(grid.scale, fill=1.0)  # (groups, padded out_features)
        self.inverse = self.scale.reciprocal()
        self.zero = None if grid.zero_point is None else self._spread(grid.zero_point, fill=0.0)

    def _spread(self, values: Tensor, fill: float) -> Tensor:
        padded = -(-self.out_features // ROW_MULTIPLE) * ROW_MULTIPLE
        spread = torch.full((values.shape[1], padded), fill, device=values.device)
        spread[:, : self.out_features] = values.T.float()
        return spread

    def set_group(self, group: int, chosen: Grid) -> None:
        """Give a group the scales and zero points of a grid of that group alone, (out_features, 1)."""
        self.scale[group, : self.out_features] = chosen.scale[:, 0].float()
        self.inverse[group] = self.scale[group].reciprocal()
        if self.zero is not None and chosen.zero_point is not None:
            self.zero[group, : self.out_features] = chosen.zero_point[:, 0].float()

    def as_grid(self) -> Grid:
        """The grid as it is now."""
        if self.grid.scheme.strategy == "tensor":
            return self.grid
        scale = self.scale[:, : self.out_features].T.to(self.grid.scale.dtype).contiguous()
        zero = None if self.zero is None else self.zero[:, : self.out_features].T.to(torch.int8).contiguous()
        return Grid(self.grid.scheme, scale, zero)

    def place(self, weight: Tensor) -> Tensor:
        """A weight (out_features, in_features) as float32 (in_features, padded out_features), in order."""
        placed = torch.zeros(len(self.order), self.scale.shape[1], device=weight.device)
        placed[:, : self.out_features] = weight.T[self.order]
        return placed

    def steps(self, values: Tensor) -> Tensor:
        """The steps that values (out_features, in_features) stand for."""
        steps = self.place(values)
        return steps if self.zero is None else steps.sub_(self.zero[self.group_of])

    def values(self, steps: Tensor) -> Tensor:
        """The values (out_features, in_features) of steps, in the dtype of the grid's scheme."""
        if self.zero is not None:
            steps = steps + self.zero[self.group_of]
        values = torch.empty_like(steps, dtype=value_dtype(self.grid.scheme))
        values[self.order] = steps.to(values.dtype)
        return values[:, : self.out_features].T.contiguous()

    def round_(self, steps: Tensor, j: int) -> Tensor:
        """Round column j's fractional steps, in place, to the nearest that the grid has."""
        return nearest_(steps, self.grid.scheme, None if self.zero is None else self.zero[self.group_of[j]])
