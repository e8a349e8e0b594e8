"""What every transform takes and gives: scales for channels that a block passes on, or a rotation of the residual."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.errors import RecipeError
from hf_shrink.ops.grid import dequantize, min_max_grid, quantize, search_grid
from hf_shrink.plan import Scheme, TransformSpec, split_transform
from hf_shrink.registry import Registry


@dataclass(frozen=True)
class ScalingCase:
    """Matrices that read one input, whose channels may be divided by scales at the source and multiplied in here.

    Attributes:
        weights: float32 (out, in) each.
        schemes: of the weights; None where one stays dense.
        statistics: of the input, with `largest`.
        unit: int64 (in,). Columns of one unit share a scale.
        weighted: whether the rounding that follows weighs columns by their second moments, as with calibration data.
        scale_dtype: dtype of the stored scales of the quantized weights.
    """

    weights: Sequence[Tensor]
    schemes: Sequence[Scheme | None]
    statistics: InputStatistics
    unit: Tensor
    weighted: bool = True
    scale_dtype: torch.dtype = torch.float32

    @property
    def units(self) -> int:
        return int(self.unit.max()) + 1

    def unit_mean(self, values: Tensor) -> Tensor:
        """(units,): the mean of (in,) values over each unit's columns."""
        total = values.new_zeros(self.units).index_add_(0, self.unit.to(values.device), values)
        return total / torch.bincount(self.unit, minlength=self.units).to(values)

    def unit_largest(self, values: Tensor) -> Tensor:
        """(units,): the largest of (in,) non-negative values over each unit's columns."""
        return values.new_zeros(self.units).scatter_reduce_(0, self.unit.to(values.device), values, "amax")

    def error(self, scale: Tensor, most_rows: int | None = None, *, clip: bool = True) -> float:
        """Squared error of the outputs, a token, when the weights are rounded to nearest under scales (units,).

        The sum over the quantized weights of tr(D H D^T), D the error of the weight on the unscaled input and H the
        input's second moment. Of weights with more than `most_rows` rows, evenly spaced ones stand for all.
        Without `clip` grids span the weights' ranges, which is many times faster than a search for them.
        """
        columns = scale[self.unit.to(scale.device)]
        hessian = self.statistics.mean
        importance = hessian.diagonal() / columns.square() if self.weighted else None
        total = 0.0
        for weight, scheme in zip(self.weights, self.schemes, strict=True):
            if scheme is None:
                continue
            rows = weight
            if most_rows is not None and len(weight) > most_rows:
                rows = weight[torch.linspace(0, len(weight) - 1, most_rows, device=weight.device).round().long()]
            scaled = rows * columns
            if clip:
                grid = search_grid(scaled, scheme, importance, self.scale_dtype)
            else:
                grid = min_max_grid(scaled, scheme, self.scale_dtype)
            lost = rows - dequantize(quantize(scaled, grid), grid) / columns
            total += float(((lost @ hessian) * lost).sum(dtype=torch.float64)) * len(weight) / len(rows)
        return total


class Scaling:
    """Base of transforms that scale channels: frozen dataclasses whose fields are a recipe's options."""

    needs_statistics: ClassVar[bool] = True

    def scales(self, case: ScalingCase) -> Tensor:
        """float32 (units,), positive: what the readers' columns are multiplied with, and the source divided by."""
        raise TypeError(f"{type(self).__name__} does not say its scales")


class Rotation:
    """Base of transforms that rotate the residual stream: frozen dataclasses whose fields are a recipe's options."""

    needs_statistics: ClassVar[bool] = False

    def matrix(self, width: int) -> Tensor:
        """float64 (width, width), orthogonal: the stream's row vectors x become x Q."""
        raise TypeError(f"{type(self).__name__} does not say its matrix")


class Shifting:
    """Base of transforms that take constants off channels: frozen dataclasses whose fields are a recipe's options."""

    needs_statistics: ClassVar[bool] = True

    def constants(self, rows: Tensor, symmetric: bool) -> Tensor:
        """(channels,), what to take off.

        Args:
            rows: float32 (tokens, channels), inputs that will be rounded with one scale a token.
            symmetric: whether they are rounded without zero points.
        """
        raise TypeError(f"{type(self).__name__} does not say its constants")


Transform = Scaling | Rotation | Shifting
TRANSFORMS: Registry[Transform] = Registry("transform", "hf_shrink.transforms")


def build_transforms(specs: Sequence[TransformSpec]) -> tuple[Transform, ...]:
    """The transforms of a recipe or plan, in their order.

    Raises:
        RecipeError: an unknown name or option, a transform named twice, or a rotation that does not come first.
    """
    built: list[Transform] = []
    names: list[str] = []
    for spec in specs:
        name, options = split_transform(spec)
        if name in names:
            raise RecipeError(f"quantize.transforms names {name!r} twice; once is enough")
        transform = TRANSFORMS.build(name, options)
        if built and isinstance(transform, Rotation):
            raise RecipeError(
                f"quantize.transforms: {name} comes first, since it mixes the channels that {names[0]} works on; "
                f"write [{', '.join([name, *names])}]"
            )
        built.append(transform)
        names.append(name)
    return tuple(built)
