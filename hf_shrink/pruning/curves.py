"""What it costs to lose units of a part, whichever kind of method says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_shrink.errors import CalibrationError, RecipeError
from hf_shrink.ops.removal import RemovalCurve
from hf_shrink.pruning.base import OrderingMethod, UnitView, WidthMethod


@dataclass(frozen=True)
class PartCurves:
    """Curves of one part's query heads or channels, and of its KV groups."""

    units: RemovalCurve
    groups: RemovalCurve | None = None

    def scaled(self, factor: float) -> PartCurves:
        """In another measure."""
        return PartCurves(self.units.scaled(factor), None if self.groups is None else self.groups.scaled(factor))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Them as tensors, whose names begin with `name`."""
        curves = {"units": self.units, "groups": self.groups}
        return {
            f"{name}.{which}.{field}": getattr(curve, field)
            for which, curve in curves.items()
            if curve is not None
            for field in ("order", "losses", "alone")
        }

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], name: str) -> PartCurves:
        """The inverse of `tensors`."""

        def curve(which: str) -> RemovalCurve:
            return RemovalCurve(*(tensors[f"{name}.{which}.{field}"] for field in ("order", "losses", "alone")))

        return cls(curve("units"), curve("groups") if f"{name}.groups.order" in tensors else None)

    @property
    def shares(self) -> PartCurves:
        """Divided by what the whole part is worth; all 0 where nothing costs anything.

        Heads are divided by the groups' total too, so that both ways to remove them are measured alike.
        """
        total = (self.units if self.groups is None else self.groups).total
        return self.scaled(1 / total if total > 0 else 0.0)


def curve_of(method: WidthMethod, view: UnitView, path: str) -> RemovalCurve:
    """The method's curve, on the CPU.

    Raises:
        CalibrationError: NaN or Inf in it.
    """
    if isinstance(method, OrderingMethod):
        curve = method.curve(view)
    else:
        scores = method.score(view)
        if scores.shape != (view.units,):
            raise RecipeError(
                f"{path}: the pruning method gave scores of shape {tuple(scores.shape)} for {view.units} units"
            )
        curve = additive_curve(scores.double().cpu(), view.groups)
    if not (torch.isfinite(curve.losses).all() and torch.isfinite(curve.alone).all()):
        raise CalibrationError(f"{path}: scores of units are NaN or Inf; check its weights and the calibration data")
    return curve


def additive_curve(scores: Tensor, groups: int | None = None) -> RemovalCurve:
    """The curve of units whose costs add up. `scores`: float64 (units,); `groups`: as of `UnitView`."""
    if groups is None:
        order = scores.argsort(stable=True)
    else:
        rows = scores.view(groups, -1)
        first = torch.arange(groups)[:, None] * rows.shape[1]
        order = (rows.argsort(dim=1, stable=True) + first).T.reshape(-1)
    return RemovalCurve(order, scores[order].cumsum(0), scores)
