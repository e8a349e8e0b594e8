"""Importance functions of the user's own, in recipes by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from hf_shrink.errors import CalibrationError, RecipeError
from hf_shrink.pruning.base import WEIGHTS, WeightView
from hf_shrink.pruning.saliency import GRANULARITIES, SaliencyMethod

if TYPE_CHECKING:
    from hf_shrink.calibration.statistics import InputStatistics

Importance = Callable[..., Tensor]


@dataclass(frozen=True)
class ByImportance(SaliencyMethod):
    """A function of the user's own as a method: one class for every function, made by `importance_method`."""

    granularity: str = "tensor"
    needs_statistics: ClassVar[bool] = False
    function: ClassVar[Importance]

    def __post_init__(self) -> None:
        self._check_granularity(("tensor", "row") if self.needs_statistics else GRANULARITIES)

    def saliency(self, view: WeightView, statistics: InputStatistics | None) -> Tensor:
        """See `SaliencyMethod.saliency`."""
        with torch.no_grad():
            if not self.needs_statistics:
                return view.as_rows(_checked(self.function(view.parameter), view.parameter))
            if statistics is None:
                raise CalibrationError("the importance function needs statistics of the inputs; pass calibration data")
            return _checked(self.function(view.rows, statistics.mean), view.rows)


def importance_method(function: Importance, needs_statistics: bool = False) -> type[ByImportance]:
    """The class of methods that choose by `function`; see `register_importance` for what it is called with."""
    body = {"function": staticmethod(function), "needs_statistics": needs_statistics}
    return type(ByImportance.__name__, (ByImportance,), body)


_REGISTERED: dict[str, type[ByImportance]] = {}


def register_importance(name: str, *, needs_statistics: bool = False) -> Callable[[Importance], Importance]:
    """Make a function f a method of `prune: {what: weights}`: weights with f(p) at most tau become zero.

    Used as a decorator; the function itself is not changed. A name may be registered again (a notebook's cell that runs
    twice), but no name of a built-in method.

        @hf_shrink.register_importance("mine")
        def mine(weight):
            return weight.abs() * weight.shape[0] ** 0.5

        shrink(model, {"steps": [{"prune": {"what": "weights", "method": "mine", "threshold": 0.05}}]})

    Args:
        name: for `method` in recipes. A plan with it can be applied wherever the function is registered.
        needs_statistics: the function is called as f(weight, second_moment) with float32 (out, in) and (in, in), the
            mean of x xᵀ over the inputs; else as f(parameter), in the parameter's own shape. Either way it returns the
            importance of every weight in the shape of its first argument.

    Raises:
        RecipeError: the name is one of a built-in method.
    """

    def add(function: Importance) -> Importance:
        if name in _REGISTERED:
            _REGISTERED[name].function = staticmethod(function)
            _REGISTERED[name].needs_statistics = needs_statistics
            return function
        if name in WEIGHTS.names():
            raise RecipeError(f"{name!r} is a method of hf_shrink; choose another name for your function")
        _REGISTERED[name] = importance_method(function, needs_statistics)
        WEIGHTS.register(name)(_REGISTERED[name])
        return function

    return add


def _checked(found: Any, given: Tensor) -> Tensor:
    """What a function gave, as a real tensor of the right shape. Raises RecipeError."""
    if not isinstance(found, Tensor) or found.shape != given.shape:
        what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise RecipeError(f"the importance function gave {what} for a weight of shape {tuple(given.shape)}")
    if found.is_complex():
        raise RecipeError("the importance function gave complex numbers, which have no order")
    real: Tensor = found.detach()
    return real if real.is_floating_point() else real.to(torch.float32)
