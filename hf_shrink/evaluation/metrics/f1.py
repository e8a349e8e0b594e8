"""Macro F1 of labels."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
from sklearn.metrics import f1_score

from hf_shrink.evaluation import modules
from hf_shrink.evaluation.bootstrap import Interval, sums_interval


class F1(modules.Module):
    """Mean over classes of 2 tp / (2 tp + fp + fn): classes that are rare count as much as others (macro F1)."""

    reads = ("prediction", "reference")
    inputs = ("labels, whole numbers or names", "the right labels")

    @classmethod
    def columns(cls) -> list[dict[str, Any]]:
        return [{"predictions": kind, "references": kind} for kind in map(datasets.Value, ("string", "int64"))]

    def interval(self, predictions: list[Any], references: list[Any], seed: int) -> Interval:
        classes = sorted({*predictions, *references})
        given = np.array(predictions)[:, None] == np.array(classes)
        right = np.array(references)[:, None] == np.array(classes)
        # Of each row and class: what it adds to 2 tp, and to the classes' 2 tp + fp + fn.
        adds = np.concatenate([2.0 * (given & right), 1.0 * given + right], 1)

        def macro(sums: np.ndarray[Any, np.dtype[np.float64]]) -> Any:
            hits, all_of_them = np.split(sums, 2, axis=-1)
            f1 = np.divide(hits, all_of_them, out=np.zeros_like(hits), where=all_of_them > 0)
            return f1.sum(-1) / np.maximum((all_of_them > 0).sum(-1), 1)  # classes that a resample lacks do not count

        _, low, high = sums_interval(adds, macro, seed)
        return float(f1_score(references, predictions, average="macro")), low, high
