"""Grids: the values a quantized weight can take, how they are chosen, and rounding onto them.

A weight w is stored as q with w ~ (q - zero_point) * scale, as in compressed-tensors: q is an integer in
[-2^(bits-1), 2^(bits-1)-1], or a float8_e4m3fn (then without zero point). Zero is always exactly on the grid. Scales
are rounded to the dtype they are stored in before any weight is rounded, so what is stored is what was used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_shrink.errors import CalibrationError
from hf_shrink.ops.at_once import at_once
from hf_shrink.plan import Scheme

# How far `search_grid` shrinks the min-max range. Few bits gain more from clipping; measured on SmolLM2-135M.
SMALLEST_RATIO = {2: 0.25, 3: 0.35, 4: 0.45, 5: 0.55, 6: 0.65, 7: 0.75, 8: 0.85}
RATIO_COUNT = 20
# Elements of the weight worked on at once by the search on a CPU: three float32 buffers of them stay in the L2 cache.
CHUNK_ELEMENTS = 1 << 16
FLOAT8 = torch.float8_e4m3fn
# Spacing is relative in float8, so scales from one octave tell all alignments apart; larger ones clip nothing.
FLOAT8_RATIOS = (1.0, *torch.linspace(0.9, 1.9, RATIO_COUNT - 1).tolist())


@dataclass(frozen=True)
class Grid:
    """The values that a weight of shape (out_features, in_features) can take under `scheme`.

    Attributes:
        scheme: bits, symmetry and strategy.
        scale: (rows, columns) in the dtype it is stored in; rows = out_features (1 for strategy "tensor"),
            columns = number of groups (1 unless strategy "group"). A symmetric grid's scale may be negative: its sign
            says on which side of zero the one extra integer lies.
        zero_point: int8, the shape of `scale`; None when symmetric.
    """

    scheme: Scheme
    scale: Tensor
    zero_point: Tensor | None = None

    def rows(self, start: int, stop: int) -> Grid:
        """The grid of the rows `start` to `stop` of the weight (of every row for strategy "tensor")."""
        if self.scheme.strategy == "tensor":
            return self
        zero_point = None if self.zero_point is None else self.zero_point[start:stop]
        return Grid(self.scheme, self.scale[start:stop], zero_point)


def integer_range(bits: int) -> tuple[int, int]:
    """The lowest and highest integer of `bits` bits, signed."""
    return -(1 << bits - 1), (1 << bits - 1) - 1


def value_range(scheme: Scheme) -> tuple[float, float]:
    """The lowest and highest value that a scheme stores."""
    if scheme.type == "float":
        return torch.finfo(FLOAT8).min, torch.finfo(FLOAT8).max
    return integer_range(scheme.bits)


def value_dtype(scheme: Scheme) -> torch.dtype:
    """The dtype of a scheme's values, unpacked."""
    return FLOAT8 if scheme.type == "float" else torch.int8


def nearest_(values: Tensor, scheme: Scheme, zero_point: Tensor | None = None) -> Tensor:
    """Round float32 steps (q - zero_point), in place, to the nearest that a scheme has, never beyond its range."""
    lowest, highest = value_range(scheme)
    if scheme.type == "float":
        return values.copy_(values.clamp_(lowest, highest).to(FLOAT8))
    if zero_point is None:
        return values.round_().clamp_(lowest, highest)
    return values.round_().clamp_(lowest - zero_point, highest - zero_point)


def min_max_grid(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Grid:
    """The grid that spans each group's range, as compressed-tensors' observers choose it.

    Args:
        weight: (out_features, in_features), any float dtype.
        scheme: a group size that does not divide in_features is resolved by `Scheme.for_width`; the grid says to what.
        scale_dtype: dtype of the stored scales.

    Raises:
        CalibrationError: the weight holds NaN or Inf.
    """
    scheme = scheme.for_width(weight.shape[1])
    low, high = _range_of_groups(_as_groups(weight.detach().float(), scheme), scheme)
    shape = _grid_shape(weight, scheme)
    lowest, highest = value_range(scheme)
    if scheme.symmetric:
        scale = torch.maximum(-low, high) / ((highest - lowest) / 2)
        return Grid(scheme, stored_scale(scale, scale_dtype).view(shape))
    scale = stored_scale((high - low) / (highest - lowest), scale_dtype)
    return Grid(scheme, scale.view(shape), _zero_point(low, scale, scheme.bits).view(shape))


def search_grid(
    weight: Tensor, scheme: Scheme, importance: Tensor | None, scale_dtype: torch.dtype, power: Literal[2, 3] = 2
) -> Grid:
    """The grid of least weighted rounding error among shrunken min-max ranges.

    Minimises sum_c |importance_c^(1/2) (w_c - dequantized_c)|^power for each group (row, tensor) over `RATIO_COUNT`
    ratios of its range. Symmetric grids are tried with the extra integer on either side of zero. Asymmetric grids
    shrink both ends alike, and with 2 or 3 bits also try the zero points next to the obvious one. float8 grids are
    widened as well.

    Args:
        weight: (out_features, in_features), any float dtype.
        scheme: a group size that does not divide in_features is resolved by `Scheme.for_width`; the grid says to what.
        importance: (in_features,) non-negative, for example the Hessian's diagonal; None weighs all columns alike.
        scale_dtype: dtype of the stored scales.
        power: of the errors that are added up; 3 cuts off less of the large weights than 2.

    Raises:
        CalibrationError: the weight or the importance holds NaN or Inf.
    """
    scheme = scheme.for_width(weight.shape[1])
    groups = _as_groups(weight.detach().float(), scheme)
    low, high = _range_of_groups(groups, scheme)
    candidates = _candidates(low, high, scheme, scale_dtype)
    roots = _importance_roots(weight, groups, importance)
    shared = scheme.strategy == "tensor"
    losses = torch.zeros(len(candidates), 1, device=weight.device, dtype=torch.float64)
    best = []
    step = max(1, at_once(groups.device, CHUNK_ELEMENTS) // roots.numel()) * len(roots)
    for start in range(0, len(groups), step):
        rows = slice(None) if shared else slice(start, start + step)
        grids = [(scale[rows], None if zero is None else zero[rows]) for scale, zero in candidates]
        errors = _rounding_errors(groups[start : start + step], roots, grids, scheme, power)
        if shared:
            losses += errors.sum(1, keepdim=True, dtype=torch.float64)
        else:
            best.append(errors.argmin(0))
    chosen = losses.argmin(0) if shared else torch.cat(best)
    shape = _grid_shape(weight, scheme)
    scale = _pick([scale for scale, _ in candidates], chosen).view(shape)
    if scheme.symmetric:
        return Grid(scheme, scale)
    return Grid(scheme, scale, _pick([zero for _, zero in candidates if zero is not None], chosen).view(shape))


def quantize(weight: Tensor, grid: Grid) -> Tensor:
    """The nearest values: int8 or float8_e4m3fn of the weight's shape (out_features, in_features)."""
    groups = _as_groups(weight.detach().float(), grid.scheme)
    values = groups / grid.scale.float().view(-1, 1)
    if grid.zero_point is not None:
        values += grid.zero_point.view(-1, 1)
    return nearest_(values, grid.scheme).to(value_dtype(grid.scheme)).view(weight.shape)


def dequantize(values: Tensor, grid: Grid) -> Tensor:
    """The weights that `values` (out_features, in_features) stand for, in float32."""
    groups = _as_groups(values.float(), grid.scheme)
    if grid.zero_point is not None:
        groups = groups - grid.zero_point.view(-1, 1)
    return (groups * grid.scale.float().view(-1, 1)).view(values.shape)


def _as_groups(weight: Tensor, scheme: Scheme) -> Tensor:
    """`weight` with one row per group; strategies "tensor" and "channel" have one per output feature."""
    return weight.reshape(-1, scheme.group_size or weight.shape[1])


def _grid_shape(weight: Tensor, scheme: Scheme) -> tuple[int, int]:
    rows, columns = weight.shape
    return (1 if scheme.strategy == "tensor" else rows, scheme.scale_columns(columns))


def _range_of_groups(groups: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Lowest and highest weight of each scale's group, (scales, 1), widened to hold zero."""
    low, high = groups.aminmax(dim=1, keepdim=True)
    if scheme.strategy == "tensor":
        low, high = low.amin(0, keepdim=True), high.amax(0, keepdim=True)
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise CalibrationError("the weight holds NaN or Inf, so it has no range to quantize; check the checkpoint")
    return low.clamp_max(0), high.clamp_min(0)


def _candidates(
    low: Tensor, high: Tensor, scheme: Scheme, scale_dtype: torch.dtype
) -> list[tuple[Tensor, Tensor | None]]:
    """Scales and zero points, each (scales, 1), for every ratio (and sign) that the search compares."""
    lowest, highest = value_range(scheme)
    if scheme.type == "float":
        span = torch.maximum(-low, high) / highest
        return [(stored_scale(span * ratio, scale_dtype), None) for ratio in FLOAT8_RATIOS]
    ratios = torch.linspace(1.0, SMALLEST_RATIO[scheme.bits], RATIO_COUNT).tolist()
    if scheme.symmetric:
        span = torch.maximum(-low, high) / highest
        return [(stored_scale(span * (sign * ratio), scale_dtype), None) for ratio in ratios for sign in (1, -1)]
    found: list[tuple[Tensor, Tensor | None]] = []
    for ratio in ratios:
        scale = stored_scale((high - low) * (ratio / (highest - lowest)), scale_dtype)
        zero_point = _zero_point(low * ratio, scale, scheme.bits)
        for shift in (0, -1, 1) if scheme.bits <= 3 else (0,):
            found.append((scale, (zero_point + shift).clamp_(lowest, highest)))
    return found


def _rounding_errors(
    groups: Tensor, roots: Tensor, grids: list[tuple[Tensor, Tensor | None]], scheme: Scheme, power: int
) -> Tensor:
    """(candidates, groups): sum over columns of |root * (w - dequantized)|^power."""
    errors = torch.empty(len(grids), len(groups), device=groups.device)
    buffer = torch.empty_like(groups)
    for index, (stored, zero_point) in enumerate(grids):
        scale = stored.float()
        torch.mul(groups, scale.reciprocal(), out=buffer)
        nearest_(buffer, scheme, None if zero_point is None else zero_point.float())
        torch.addcmul(groups, buffer, scale, value=-1, out=buffer)
        buffer.view(-1, *roots.shape).mul_(roots)
        if power == 3:
            buffer.mul_(buffer.abs().sqrt_())
        torch.linalg.vector_norm(buffer, dim=1, out=errors[index])
    return errors.square_()


def _importance_roots(weight: Tensor, groups: Tensor, importance: Tensor | None) -> Tensor:
    """Square roots of the importance, (groups in a row, group size), largest 1."""
    if importance is None:
        return torch.ones(1, groups.shape[1], device=weight.device)
    importance = importance.to(weight.device, torch.float32)
    if not torch.isfinite(importance).all():
        raise CalibrationError("the importance of the columns holds NaN or Inf, so no scale can be chosen by it")
    largest = importance.max()
    return (importance / torch.where(largest > 0, largest, 1.0)).sqrt_().view(-1, groups.shape[1])


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` as it is stored: rounded to `dtype`, finite, never zero (1 where a group is all zeros)."""
    # Scales are found and used in float32, whatever they are stored in.
    info = torch.finfo(torch.float32 if dtype == torch.float64 else dtype)
    # float16 has no room to spare, so its subnormals are used; the others' have no finite float32 reciprocal.
    smallest = info.smallest_normal * info.eps if dtype == torch.float16 else info.smallest_normal
    magnitude = scale.abs().clamp(smallest, info.max)
    return torch.where(scale == 0, 1.0, magnitude * scale.sign()).to(dtype)


def _zero_point(low: Tensor, scale: Tensor, bits: int) -> Tensor:
    lowest, highest = integer_range(bits)
    return (lowest - low / scale.float()).round_().clamp_(lowest, highest).to(torch.int8)


def _pick(options: list[Tensor], chosen: Tensor) -> Tensor:
    """Element `chosen[i]` of the options' row i."""
    return torch.cat(options, dim=1).gather(1, chosen.view(-1, 1))
