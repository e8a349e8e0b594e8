"""Which data a recipe wants, and what it wants measured."""

from __future__ import annotations

from dataclasses import dataclass

from hf_shrink.errors import RecipeError
from hf_shrink.registry import did_you_mean
from hf_shrink.resources import metric_names
from hf_shrink.values import as_list

# What is measured where nothing is named, as far as there are files for it.
METRICS = tuple(name for name in ("perplexity", "kl_divergence", "top1_agreement") if name in metric_names())


@dataclass(frozen=True)
class CalibrationSpec:
    """Which data the statistics come from.

    Attributes:
        data: a built-in data recipe's name ("self", "wikitext", ...) or the path of a .txt, .jsonl or .parquet file.
        samples, length: how many sequences of how many tokens (images, clips: `length` is unused).
        batch_size: sequences per forward pass; fixed here so that results never depend on memory.
    """

    data: str = "self"
    samples: int = 128
    length: int = 512
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name, value in (("samples", self.samples), ("length", self.length), ("batch_size", self.batch_size)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RecipeError(f"calibration.{name} must be a whole number of at least 1, not {value!r}")


@dataclass(frozen=True)
class EvaluationSpec:
    """What is measured after the run, and on what.

    Attributes:
        data: `self`, a data recipe's name or a file. `self` uses samples and a seed disjoint from calibration.
        metrics: by name.
        samples, length: how many windows of how many tokens: `length` is the context.
        batch_size: sequences per forward pass.
        stride: tokens between the starts of two windows of running text, of which only the new ones are scored; None:
            windows do not overlap, and all but the first token of each is scored.
    """

    data: str = "self"
    metrics: tuple[str, ...] = METRICS
    samples: int = 16
    length: int = 512
    batch_size: int = 8
    stride: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "metrics", as_list(self.metrics, "evaluation.metrics"))
        known = metric_names()
        for metric in self.metrics:
            if metric not in known:
                raise RecipeError(f"unknown metric {metric!r} in evaluation; {did_you_mean(metric, known)}")
        if self.stride is not None and not (isinstance(self.stride, int) and 1 <= self.stride <= self.length):
            raise RecipeError(
                f"evaluation.stride must be a whole number from 1 to length ({self.length}), not {self.stride!r}"
            )
        for name, value in (("samples", self.samples), ("length", self.length), ("batch_size", self.batch_size)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RecipeError(f"evaluation.{name} must be a whole number of at least 1, not {value!r}")
