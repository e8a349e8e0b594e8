"""The optimal brain surgeon for units: what is lost after the others have made up for it as well as they can."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_shrink.errors import CalibrationError
from hf_shrink.ops.exchange import exchanged
from hf_shrink.ops.removal import RemovalCurve, removal_curve
from hf_shrink.pruning.base import WIDTH, UnitView


@WIDTH.register("obs")
@dataclass(frozen=True)
class OptimalBrainSurgeon:
    """Structured OBS, as in ZipLM (Kurtic et al., arXiv 2302.04089) and SlimGPT (Ling et al., arXiv 2412.18110).

    The unit S whose loss tr(W_S (H^-1_SS)^-1 W_S^T) is least goes, weights and inverse are updated, and so on: one unit
    at a time, at the price of groups, since updates wait in panels. What is chosen in the end is improved by exchanging
    removed with kept units while the loss falls, as in OSSCAR (Meng et al., arXiv 2403.12983).

    Attributes:
        damping: fraction of the mean second moment that is added to the diagonal.
        exchanges: rounds of exchanges at most; 0: none.
    """

    damping: float = 0.01
    exchanges: int = 8

    needs_statistics: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.damping, int | float) or not 0 < self.damping <= 1:
            raise ValueError(f"damping must be above 0 and at most 1, not {self.damping!r}")
        if not isinstance(self.exchanges, int) or self.exchanges < 0:
            raise ValueError(f"exchanges must be a whole number of at least 0, not {self.exchanges!r}")

    def curve(self, view: UnitView) -> RemovalCurve:
        weight, moment, width = _problem(view)
        return removal_curve(weight, moment, self.damping, width=width, groups=view.groups)

    def improved(self, view: UnitView, removed: Tensor) -> Tensor:
        weight, moment, width = _problem(view)
        return exchanged(weight, moment, self.damping, removed, width=width, groups=view.groups, rounds=self.exchanges)


def _problem(view: UnitView) -> tuple[Tensor, Tensor, int]:
    if view.second_moment is None:
        raise CalibrationError("obs needs statistics of the inputs; pass calibration data")
    return view.columns.flatten(1), view.second_moment, view.columns.shape[2]
