"""What a student is trained on, and how much each part of it counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from hf_shrink.errors import RecipeError
from hf_shrink.registry import did_you_mean


@dataclass(frozen=True)
class Distillation:
    """Weights of the parts of the loss; a part with the weight 0 is not computed.

    Attributes:
        logits: of the KL divergence from the teacher's predictions (Hinton et al., arXiv 1503.02531), in nats a
            prediction.
        task: of the model's own loss on the labels.
        hidden: of the relative squared error of the hidden states behind every block, against the teacher's in front of
            the next block that was kept (FitNets, Romero et al., arXiv 1412.6550).
        attention: of the KL divergence from the teacher's attention, mean over rows, heads and blocks (MiniLM, Wang et
            al., arXiv 2002.10957). Needs attention by "eager" on both sides.
        temperature: both models' logits are divided by it, for the part `logits`.
    """

    logits: float = 0.5
    task: float = 0.5
    hidden: float = 0.0
    attention: float = 0.0
    temperature: float = 2.0

    def __post_init__(self) -> None:
        for name in ("logits", "task", "hidden", "attention"):
            value = getattr(self, name)
            if not _is_number(value) or value < 0:
                raise RecipeError(f"distillation.{name} must be a number of at least 0, not {value!r}")
        if not _is_number(self.temperature) or self.temperature <= 0:
            raise RecipeError(f"distillation.temperature must be above 0, not {self.temperature!r}")
        if not (self.needs_teacher or self.task):
            raise RecipeError("every part of the distillation has the weight 0; give logits or task a weight")

    @property
    def needs_teacher(self) -> bool:
        return bool(self.logits or self.inside)

    @property
    def inside(self) -> bool:
        """Whether it looks inside the models."""
        return bool(self.hidden or self.attention)

    @classmethod
    def of(cls, options: Distillation | Mapping[str, Any]) -> Distillation:
        """From a mapping. Raises RecipeError that names the nearest valid key."""
        if isinstance(options, Distillation):
            return options
        valid = [field.name for field in fields(cls)]
        for key in options:
            if key not in valid:
                raise RecipeError(f"unknown key {key!r} in distillation; {did_you_mean(key, valid)}")
        return cls(**options)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
