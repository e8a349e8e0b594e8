"""The options of width methods that score by gradients, and what they read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from hf_shrink.calibration.labels import Labels
from hf_shrink.errors import CalibrationError, RecipeError
from hf_shrink.pruning.base import UnitView
from hf_shrink.registry import did_you_mean


@dataclass(frozen=True)
class GradientScore:
    """See `GradientMethod` in base.py.

    Attributes:
        tokens: about how many calibration tokens to take gradients on, chosen by the run's seed; None: all.
        labels: what the loss is of. "data": the next tokens of the text, or the labels in the batches. "model": labels
            drawn from the model's own predictions, so that none are needed. "auto": the data's where it has any.
    """

    tokens: int | None = 32 * 512
    labels: Labels = "auto"

    def __post_init__(self) -> None:
        if self.tokens is not None and (not isinstance(self.tokens, int) or self.tokens < 1):
            raise RecipeError(f"tokens must be a whole number of at least 1, not {self.tokens!r}")
        if self.labels not in get_args(Labels):
            raise RecipeError(f"unknown labels {self.labels!r}; {did_you_mean(str(self.labels), get_args(Labels))}")


def needed(view: UnitView, method: str) -> Tensor:
    """The view's mask gradients, float32 (samples, units). Raises CalibrationError without any."""
    if view.mask_gradients is None:
        raise CalibrationError(f"{method} needs gradients of the loss; pass calibration data")
    return view.mask_gradients
