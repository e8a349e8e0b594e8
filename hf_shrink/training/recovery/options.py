"""How a compressed model gets its quality back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from hf_shrink.errors import RecipeError
from hf_shrink.registry import did_you_mean

Method = Literal["lora", "full", "scales"]
METHODS = ("lora", "full", "scales")
TOKENS: Mapping[str, int] = {"lora": 2048, "full": 2048, "scales": 1024}  # of a step
RANK = 32  # of adapters
RATES: Mapping[str, float] = {"lora": 1e-3, "full": 1e-4}  # of Adam's steps: adapters; all weights


@dataclass(frozen=True)
class Recovery:
    """What `recover` does, and for how long.

    Attributes:
        method: "lora": low-rank adapters on every matrix of the blocks (arXiv 2106.09685; on bitsandbytes' NF4: QLoRA,
            2305.14314). "full": every weight, of a dense model. "scales": scales, zero points, norms and biases of a
            quantized model (the second phase of EfficientQAT, 2407.11062), for which nothing is added to it. None:
            "scales" where weights are packed, else "lora".
        steps, minutes: of training; one of them at least. The same steps give the same model; minutes count from the
            call of `recover`, preparations included, and do not.
        learning_rate: the largest; None: what the method does well with.
        rank: "lora": of the adapters; None: `RANK`. Their alpha is twice as large.
        tokens: of one step; None: what the method does well with, see `TOKENS`.
        samples, length: how many sequences of how many tokens are taken from the data.
        held_out: fraction of the data that is not trained on and decides whether the model is adopted.
        hidden: weight of the hidden states' error beside the predictions' divergence ("lora" and "full").
        task: weight of the loss on the data's own next tokens or labels beside it. 1 where there is no teacher.
        temperature: of the predictions ("lora" and "full").
        rounding: "scales": also train which way every weight is rounded.
    """

    method: Method | None = None
    steps: int | None = None
    minutes: float | None = None
    learning_rate: float | None = None
    rank: int | None = None
    tokens: int | None = None
    samples: int = 128
    length: int = 512
    held_out: float = 0.06
    hidden: float = 0.0
    task: float = 0.0
    temperature: float = 1.0
    rounding: bool = False

    def __post_init__(self) -> None:
        if self.method is not None and self.method not in METHODS:
            raise RecipeError(f"unknown recovery method {self.method!r}; {did_you_mean(str(self.method), METHODS)}")
        if self.steps is None and self.minutes is None:
            raise RecipeError("recovery needs an end: give steps, for example 200, or minutes, for example 15")
        for name in ("steps", "rank", "tokens", "samples", "length"):
            value = getattr(self, name)
            if value is None and name in ("steps", "rank", "tokens"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RecipeError(f"recovery.{name} must be a whole number of at least 1, not {value!r}")
        for name, low, high in (("minutes", 0, None), ("learning_rate", 0, 1), ("held_out", 0, 1)):
            value = getattr(self, name)
            if value is None and name != "held_out":
                continue
            if not isinstance(value, int | float) or value <= low or (high is not None and value >= high):
                below = "" if high is None else f" and below {high}"
                raise RecipeError(f"recovery.{name} must be above {low}{below}, not {value!r}")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Recovery:
        """From a mapping. Raises RecipeError that names the nearest valid key."""
        valid = [field.name for field in fields(cls)]
        for key in options:
            if key not in valid:
                raise RecipeError(f"unknown option {key!r} of recovery; {did_you_mean(key, valid)}")
        return cls(**options)

    def step(self, method: Method) -> int:
        """Tokens of a step."""
        return TOKENS[method] if self.tokens is None else self.tokens

    def rate(self, method: Method) -> float:
        """The largest learning rate of "lora" or "full"."""
        return RATES[method] if self.learning_rate is None else self.learning_rate
