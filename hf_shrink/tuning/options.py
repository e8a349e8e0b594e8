"""The options of tuning: the keys of a recipe's `quantize: {tune: {...}}`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from hf_shrink.errors import RecipeError
from hf_shrink.registry import did_you_mean

COARSE_RATE = 8e-3  # of scales, at one bit
FARTHEST = 0.9  # steps of the grid that a rounding can move
MOST_OWN = 10  # times as much own text as calibration data
FASTEST = 0.03  # steps of the grid in an optimizer step: SmolLM2's roundings fall apart at 0.1


@dataclass(frozen=True)
class Tuning:
    """How the model is tuned after rounding.

    Attributes:
        steps: optimizer steps, each on about `tokens` tokens.
        tokens: of one step; calibration batches are put together to that many.
        own_text: how much text of its own the dense model writes to be tuned on as well, as a share of the calibration
            data; only for models of text alone that write from left to right.
        learning_rate: of the logarithms of scales, and of norms and biases relative to their size. None: by the bits,
            see `scale_rate`.
        rounding: also train zero points, and which way every weight is rounded, which takes 16 bytes a weight. "auto":
            where that is not more than 16 GB.
        rounding_rate: of roundings and zero points, in steps of the grid. None: see `integer_rate`.
        held_out: fraction of the calibration batches that is not trained on and decides whether tuning is kept.
    """

    steps: int
    learning_rate: float | None = None
    rounding: bool | Literal["auto"] = False
    rounding_rate: float | None = None
    held_out: float = 0.125
    tokens: int = 1024
    own_text: float = 0.0

    def __post_init__(self) -> None:
        for name in ("steps", "tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RecipeError(f"tune.{name} must be a whole number of at least 1, not {value!r}")
        if not isinstance(self.rounding, bool) and self.rounding != "auto":
            raise RecipeError(f"tune.rounding must be true, false or auto, not {self.rounding!r}")
        own = self.own_text
        if not isinstance(own, int | float) or isinstance(own, bool) or not 0 <= own <= MOST_OWN:
            raise RecipeError(f"tune.own_text must be a number from 0 to {MOST_OWN}, not {own!r}")
        for name in ("learning_rate", "rounding_rate", "held_out"):
            value = getattr(self, name)
            if value is None and name != "held_out":
                continue
            if not isinstance(value, int | float) or not 0 < value < 1:
                raise RecipeError(f"tune.{name} must be above 0 and below 1, not {value!r}")

    def scale_rate(self, bits: int) -> float:
        """The learning rate of scales of so many bits: by default in proportion to the steps of their grid."""
        return COARSE_RATE / 2 ** (bits - 1) if self.learning_rate is None else self.learning_rate

    @property
    def integer_rate(self) -> float:
        """The learning rate of roundings and zero points.

        Adam moves a number by its rate in a step at most, and the rate falls to zero: all in all by half of steps x
        rate. By default that is `FARTHEST`, so that a weight whose gradient keeps its sign changes its side, which
        takes half a step of the grid; fewer than 40 steps are too few for that.
        """
        return min(FASTEST, 2 * FARTHEST / self.steps) if self.rounding_rate is None else self.rounding_rate

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Tuning | None:
        """From a recipe's mapping; None when that is empty. Raises RecipeError naming the nearest valid key."""
        if not options:
            return None
        valid = [field.name for field in fields(cls)]
        for key in options:
            if key not in valid:
                raise RecipeError(f"unknown key {key!r} in quantize.tune; {did_you_mean(key, valid)}")
        if "steps" not in options:
            raise RecipeError("quantize.tune needs steps, for example {steps: 100}")
        return cls(**options)
