"""GPTQ (Frantar et al., arXiv 2210.17323): round a column, let the columns not yet rounded make up for its error.

Act order without a cost at run time: groups are taken in order of falling second moment, and so are the columns in
each. A group's scales are chosen when its first column is reached, on the weights as they have become by then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from hf_shrink.errors import CalibrationError
from hf_shrink.ops.columns import ROW_MULTIPLE, GridColumns
from hf_shrink.ops.grid import Grid, dequantize, min_max_grid, search_grid
from hf_shrink.ops.linalg import InverseFactor, damped, damped_inverse_factor, dead_channels, relative_error
from hf_shrink.plan import Scheme
from hf_shrink.quantization.base import METHODS, QuantizedWeight
from hf_shrink.quantization.descent import descend
from hf_shrink.quantization.drift import corrected, held_out_loss
from hf_shrink.sharding import spread, stretches

if TYPE_CHECKING:
    from hf_shrink.calibration.statistics import InputStatistics

DAMPINGS = (0.01, 0.03, 0.1)
TRIAL_ROWS = 128  # of a weight, on which dampings are compared


@METHODS.register("gptq")
@dataclass(frozen=True)
class GPTQ:
    """GPTQ with a scale search and, after it, rounds of coordinate descent.

    Attributes:
        damping: fraction of the mean second moment that is added to the Hessian's diagonal; grown where Cholesky fails.
            None: for every weight the best of `DAMPINGS` on held-out tokens, or the first of them without such tokens.
        act_order: round the columns with the largest second moment first.
        rescale: choose a group's scales when it is reached, on the compensated weights; act order then goes group by
            group. Otherwise all scales are chosen before, and act order goes by columns.
        block_size: columns after which the errors are applied to all later columns; changes speed only.
        refinements: rounds of coordinate descent on integers and scales after GPTQ's own pass.
        true_sequential: within a block, later weights see what the rounded earlier ones give (attention in, attention
            out, MLP in, MLP out). Otherwise all see what the block gave before, and there is no asymmetric target.
        asymmetric: aim at the dense model's outputs on the compressed model's inputs, as far as held-out tokens gain
            by it; see `drift.py`.
    """

    damping: float | None = None
    act_order: bool = True
    rescale: bool = True
    block_size: int = 64
    refinements: int = 1
    true_sequential: bool = True
    asymmetric: bool = True
    needs_statistics: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.damping is not None and not self.damping > 0:
            raise ValueError(f"damping must be above 0, not {self.damping!r}")
        for name, least in (("block_size", 1), ("refinements", 0)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, not {getattr(self, name)!r}")

    @property
    def follows_dense(self) -> bool:
        """Statistics should have a drift."""
        return self.asymmetric and self.true_sequential

    def solve(
        self,
        weight: Tensor,
        scheme: Scheme,
        statistics: InputStatistics | None,
        *,
        scale_dtype: torch.dtype,
        kept: Tensor | None = None,
    ) -> QuantizedWeight:
        """See `QuantizationMethod.solve`."""
        if statistics is None or statistics.tokens == 0:
            raise CalibrationError("GPTQ has seen no inputs of this Linear; use more calibration data, or method: rtn")
        # The sum, not the mean, which would be one more of the largest matrices: no step depends on its scale.
        weight, moment = weight.detach(), statistics.hessian.to(weight.device)
        order = self._order(moment.diagonal(), scheme.for_width(len(moment)).group_size)
        # Under a mask the correction has been taken with the mask.
        target = corrected(weight, statistics)[0] if self.asymmetric and kept is None else weight
        asked, inverse = self._best_damping(weight, target, scheme, statistics, scale_dtype, moment, order, kept)

        def solve(rows: slice) -> QuantizedWeight:
            mask = None if kept is None else kept[rows]
            return self._solve(target[rows], scheme, scale_dtype, moment, inverse, mask)

        found = _by_rows(target, scheme, moment, solve)
        return replace(found, notes=_notes(moment, asked, inverse.damping))

    def _best_damping(
        self,
        weight: Tensor,
        target: Tensor,
        scheme: Scheme,
        statistics: InputStatistics,
        scale_dtype: torch.dtype,
        moment: Tensor,
        order: Tensor,
        kept: Tensor | None,
    ) -> tuple[float, InverseFactor]:
        """A damping and the damped inverse: by the outputs that some of the rows give on held-out tokens."""
        drift = statistics.drift
        if self.damping is not None or drift is None or not drift.held.hessian.any():
            damping = self.damping or DAMPINGS[0]
            return damping, damped_inverse_factor(moment, damping, order, torch.float32)
        step = -(-len(weight) // TRIAL_ROWS)
        rows, mask = target[::step], None if kept is None else kept[::step]
        best: list[tuple[float, float, InverseFactor]] = []  # of those tried here; one at most: they are large

        def loss_with(damping: float) -> float:
            inverse = damped_inverse_factor(moment, damping, order, torch.float32)
            found = self._solve(rows, scheme, scale_dtype, moment, inverse, mask)
            loss = held_out_loss(weight[::step], found.dequantized(), drift)
            if not best or loss < best[0][0]:
                best[:] = [(loss, damping, inverse)]
            return loss

        losses = spread(DAMPINGS, loss_with)
        chosen = DAMPINGS[losses.index(min(losses))]
        if best and best[0][1] == chosen:
            return best[0][1:]
        return chosen, damped_inverse_factor(moment, chosen, order, torch.float32)

    def _solve(
        self,
        weight: Tensor,
        scheme: Scheme,
        scale_dtype: torch.dtype,
        moment: Tensor,
        inverse: InverseFactor,
        kept: Tensor | None,
    ) -> QuantizedWeight:
        scheme = scheme.for_width(len(moment))
        with damped(moment, inverse.damping):
            # Weighting by U_jj^-2, what an error costs once later columns have made up for it, lowers the layer's error
            # but raises the model's (SmolLM2-135M, W4 g64: KL divergence 0.126 instead of 0.095).
            importance = moment.diagonal()
            regrouped = self.rescale and scheme.strategy == "group"
            if regrouped:
                grid = min_max_grid(weight, scheme, scale_dtype)  # its scales are chosen on the way
            else:
                grid = search_grid(weight, scheme, importance, scale_dtype)
            values, grid = round_columns(
                weight, grid, inverse.order, inverse.upper, self.block_size, importance if regrouped else None, kept
            )
            if self.refinements:
                values, grid = descend(weight, values, grid, moment, self.refinements, kept)
        return QuantizedWeight(values, grid, relative_error(weight, dequantize(values, grid), moment))

    def _order(self, diagonal: Tensor, group_size: int | None) -> Tensor:
        """(in,) the columns in the order in which they are rounded."""
        if not self.act_order:
            return torch.arange(len(diagonal), device=diagonal.device)
        if not self.rescale or group_size is None:
            return diagonal.argsort(descending=True, stable=True)
        groups = diagonal.view(-1, group_size)
        within = groups.argsort(dim=1, descending=True, stable=True)
        starts = torch.arange(0, len(diagonal), group_size, device=diagonal.device)
        return (within + starts[:, None])[groups.mean(1).argsort(descending=True, stable=True)].flatten()


def _by_rows(
    target: Tensor, scheme: Scheme, moment: Tensor, solve: Callable[[slice], QuantizedWeight]
) -> QuantizedWeight:
    """A weight solved by `solve`. Its rows are independent, so that each of several processes takes some."""
    apart = stretches(len(target), ROW_MULTIPLE)
    if len(apart) == 1 or scheme.strategy == "tensor":
        return solve(slice(None))

    def part(rows: slice) -> tuple[QuantizedWeight, float]:
        own = target[rows]
        return solve(rows), float(((own @ moment) * own).sum(dtype=torch.float64))

    found = spread(apart, part)
    return QuantizedWeight.stacked([solved for solved, _ in found], [size for _, size in found])


def _notes(hessian: Tensor, asked: float, used: float) -> tuple[str, ...]:
    notes = []
    if dead := int(dead_channels(hessian).sum()):
        notes.append(f"{dead} of {len(hessian)} input channels were always zero; their weights are rounded to nearest")
    if used > asked:
        notes.append(f"damping grew from {asked:g} to {used:g} until the Hessian could be factored")
    return tuple(notes)


def round_columns(
    weight: Tensor,
    grid: Grid,
    order: Tensor,
    upper: Tensor,
    block_size: int,
    importance: Tensor | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Grid]:
    """GPTQ's pass over the columns.

    Args:
        weight: (out, in) float32.
        grid: of the weight.
        order: (in,) the columns in the order they are rounded.
        upper: (in, in) float32 upper Cholesky factor U of the inverse Hessian, in that order.
        block_size: columns worked on before all later ones are updated.
        importance: (in,) of the columns: each group's scales are searched for anew when its first column is reached.
            None: the grid stays as it is.
        kept: bool (out, in) of the weights that may be anything but zero; None: all. Later columns make up for what the
            others would have become, as in SparseGPT.

    Returns:
        Values (out, in) in the dtype of the scheme, columns in the weight's own order, and the grid.
    """
    columns = GridColumns(grid, len(weight), order)
    remaining = columns.place(weight)
    steps = torch.empty_like(remaining)
    errors = torch.empty_like(remaining[:block_size])
    pivots = upper.diagonal().tolist()
    mask = None if kept is None else columns.place(kept.float())
    chosen: set[int] = set()
    for start in range(0, len(order), block_size):
        stop = min(start + block_size, len(order))
        for j in range(start, stop):
            group, column, error = columns.group_of[j], remaining[j], errors[j - start]
            if importance is not None and group not in chosen:
                chosen.add(group)
                places = [k for k, other in enumerate(columns.group_of) if other == group]
                now = remaining[places] - upper[start:j, places].T @ errors[: j - start]
                now = now if mask is None else now * mask[places]
                columns.set_group(group, _search_group(now[:, : len(weight)].T, grid, importance[order[places]]))
            if j > start:  # make up for the earlier columns of this block
                column.addmv_(errors[: j - start].T, upper[start:j, j], alpha=-1)
            torch.mul(column, columns.inverse[group], out=steps[j])
            columns.round_(steps[j], j)
            if mask is not None:
                steps[j].mul_(mask[j])
            torch.addcmul(column, steps[j], columns.scale[group], value=-1, out=error).div_(pivots[j])
        # ... and let all later blocks make up for this one
        remaining[stop:].addmm_(upper[start:stop, stop:].T, errors[: stop - start], alpha=-1)
    return columns.values(steps), columns.as_grid()


def _search_group(weight: Tensor, grid: Grid, importance: Tensor) -> Grid:
    """The grid of one group's columns, (out, group size)."""
    alone = replace(grid.scheme, strategy="channel", group_size=None)
    return search_grid(weight, alone, importance, grid.scale.dtype)
