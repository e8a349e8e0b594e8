"""What the metric files share. Each holds one class of these, which `evaluate.load` finds in it.

Imports `evaluate`, which takes seconds: only metric files import this one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import datasets
import evaluate

from hf_shrink.evaluation.bootstrap import Interval, ratio_interval

Figure = dict[str, float | None]


class Module(evaluate.Metric, ABC):  # type: ignore[misc]  # evaluate has no types
    """A metric that gives its value under its own name, and the ends of a 95% bootstrap interval as low and high.

    Its docstring is the description that `evaluate` shows.

    Attributes:
        reads: the columns of `Observed` that `evaluate_model` hands over as predictions and references; "baseline."
            before a name means the dense model's. A metric that reads one of them, or a column that both models made
            together, has no figure for the dense model alone.
        inputs: what predictions and references are, for people.
        better: which way is good; of groups, the worst one is the farthest the other way.
        costly: more than the forward passes that are made anyway: only where it is asked for by name.
        stands_in: given unasked where nothing that compares the two models can be.
        paper: what it comes from.
    """

    reads: ClassVar[tuple[str, str]]
    inputs: ClassVar[tuple[str, str]]
    better: ClassVar[Literal["higher", "lower"]] = "higher"
    costly: ClassVar[bool] = False
    stands_in: ClassVar[bool] = False
    paper: ClassVar[str] = ""

    @classmethod
    @abstractmethod
    def columns(cls) -> list[dict[str, Any]]:
        """What predictions and references may be: features of `datasets`, the first that fits is taken."""

    @abstractmethod
    def interval(self, predictions: list[Any], references: list[Any], seed: int) -> Interval:
        """(value, low, high); low and high are None where nothing can be resampled."""

    def _info(self) -> evaluate.MetricInfo:
        predictions, references = self.inputs
        returned = "the value under the metric's name; low, high: its 95% bootstrap interval (None for too few rows)"
        arguments = f"predictions: list, {predictions}\nreferences: list, {references}\nseed: of the bootstrap"
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation=self.paper,
            inputs_description=f"\nArgs:\n{arguments}\n\nReturns: {returned}\n",
            features=[datasets.Features(columns) for columns in self.columns()],
        )

    def _compute(self, predictions: list[Any], references: list[Any], seed: int = 0) -> Figure:
        value, low, high = self.interval(predictions, references, seed)
        return {self.name: value, "low": low, "high": high}


class Ratio(Module):
    """sum(predictions) / sum(references): one total and one count a sequence, however long it is."""

    @classmethod
    def columns(cls) -> list[dict[str, Any]]:
        return [{"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}]

    def interval(self, predictions: list[float], references: list[int], seed: int) -> Interval:
        value, low, high = ratio_interval(predictions, references, seed)
        # The scale is monotonic, so the ends of the mean's interval become those of the figure's.
        return self.scale(value), None if low is None else self.scale(low), None if high is None else self.scale(high)

    def scale(self, mean: float) -> float:
        """From the mean to the figure; rises with it."""
        return mean


class Texts(Module):
    """Mean over rows of how well a text agrees with the best of its references."""

    inputs = ("texts, or {id, prediction_text} as of SQuAD", "a text or list of texts each, or SQuAD's {id, answers}")

    @classmethod
    def columns(cls) -> list[dict[str, Any]]:
        text = datasets.Value("string")
        answers = datasets.Sequence({"text": text, "answer_start": datasets.Value("int32")})
        squad = {"predictions": {"id": text, "prediction_text": text}, "references": {"id": text, "answers": answers}}
        several = {"predictions": text, "references": datasets.Sequence(text)}
        return [{"predictions": text, "references": text}, several, squad]

    @abstractmethod
    def score(self, text: str, reference: str) -> float:
        """From 0 to 1."""

    def interval(self, predictions: list[Any], references: list[Any], seed: int) -> Interval:
        texts = [p["prediction_text"] if isinstance(p, dict) else p for p in predictions]
        scores = [
            max((self.score(text, one) for one in _all(reference)), default=self.score(text, ""))
            for text, reference in zip(texts, references, strict=True)
        ]
        return ratio_interval(scores, [1] * len(scores), seed)


def _all(reference: Any) -> list[str]:
    """The texts of a reference; none where a question has no answer."""
    if isinstance(reference, dict):
        reference = reference["answers"]["text"]
    return [reference] if isinstance(reference, str) else list(reference)
