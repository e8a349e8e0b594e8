"""A weight on its grid: what quantization methods make and packed modules hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_shrink.ops.grid import Grid, dequantize


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight on its grid.

    Attributes:
        values: int8, or float8_e4m3fn for float schemes, (out_features, in_features).
        grid: the scales and zero points that the values refer to.
        error: relative squared error of the Linear's outputs, tr(D H D^T) / tr(W H W^T) with D = W - dequantized;
            without statistics H is the identity. Of the whole weight that was solved, also after `rows`.
        notes: what the user should know, for example grown damping. The caller adds the module's name.
        sparse: the weight was pruned; its zeros are to stay zero whatever is done to it later.
    """

    values: Tensor
    grid: Grid
    error: float
    notes: tuple[str, ...] = ()
    sparse: bool = False

    def dequantized(self) -> Tensor:
        """The weights in float32, (out_features, in_features)."""
        return dequantize(self.values, self.grid)

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """Rows `start` to `stop`: one Linear of several that were stacked and solved as one."""
        return replace(self, values=self.values[start:stop], grid=self.grid.rows(start, stop))

    @classmethod
    def stacked(cls, parts: Sequence[QuantizedWeight], sizes: Sequence[float]) -> QuantizedWeight:
        """One weight of parts of its rows. `sizes`: the sums of squares that their errors are relative to."""
        if len(parts) == 1:
            return parts[0]
        first = parts[0].grid
        zero_points = [part.grid.zero_point for part in parts if part.grid.zero_point is not None]
        grid = Grid(
            first.scheme,
            torch.cat([part.grid.scale for part in parts]),
            torch.cat(zero_points) if zero_points else None,
        )
        lost = sum(part.error * size for part, size in zip(parts, sizes, strict=True))
        notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
        return cls(torch.cat([part.values for part in parts]), grid, lost / max(sum(sizes), 1e-30), notes)
