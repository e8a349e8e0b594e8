"""Accuracy of labels or chosen answers."""

from __future__ import annotations

from typing import Any

import datasets
from sklearn.metrics import accuracy_score

from hf_shrink.evaluation import modules
from hf_shrink.evaluation.bootstrap import Interval, ratio_interval


class Accuracy(modules.Module):
    """Share of rows whose label, or chosen answer, is the right one."""

    reads = ("prediction", "reference")
    inputs = ("labels, whole numbers or names", "the right labels")

    @classmethod
    def columns(cls) -> list[dict[str, Any]]:
        return [{"predictions": kind, "references": kind} for kind in map(datasets.Value, ("string", "int64"))]

    def interval(self, predictions: list[Any], references: list[Any], seed: int) -> Interval:
        right = [float(one == other) for one, other in zip(predictions, references, strict=True)]
        _, low, high = ratio_interval(right, [1] * len(right), seed)
        return float(accuracy_score(references, predictions)), low, high
