"""The predictions of one forward pass that count, whatever the task head puts out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hf_shrink.calibration.targets import IGNORED, Batch, Hidden, Kind, targets_of
from hf_shrink.errors import CalibrationError
from hf_shrink.tuning.divergence import logit_divergence, state_error

Choice = Literal["one class", "several", "numbers"]
_CHOICES: dict[str, Choice] = {
    "single_label_classification": "one class",
    "multi_label_classification": "several",
    "regression": "numbers",
}


@dataclass(frozen=True)
class Counted:
    """Rows of a batch, example by example.

    Attributes:
        values: (n, classes) logits, or (n, width) hidden states or numbers.
        distribution: whether they are logits.
        examples: how many rows each example of the batch has.
    """

    values: Tensor
    distribution: bool
    examples: tuple[int, ...]


def choice_of(kind: Kind, batch: Batch, outputs: Any, *models: Any) -> Choice:
    """What a head chooses: one of its classes, each of them or not, or nothing, as it puts out numbers.

    As the first of the models' configs that says it (`problem_type`). Where none does, as transformers takes it by the
    labels when it computes a loss: numbers as labels of the logits' shape are for several classes.
    """
    logits, labels = outputs.get("logits"), batch.get("labels")
    if kind != "other" or logits is None:
        return "one class"
    if logits.shape[-1] == 1:
        return "numbers"
    said = (getattr(getattr(model, "config", None), "problem_type", None) for model in models)
    problem = next((name for name in said if name is not None), None)
    if problem is not None:
        return _CHOICES.get(problem, "one class")
    several = labels is not None and labels.is_floating_point() and labels.shape == logits.shape
    return "several" if several else "one class"


def counted(kind: Kind, batch: Batch, outputs: Any, choice: Choice) -> Counted:
    """The rows of a model's outputs that count: real tokens that are predicted, and of these such as have a label
    where the batch has labels of that shape (-100: none).

    Args:
        kind: how the model is scored, see `kind_of`.
        batch: with what the model was called, labels included.
        choice: see `choice_of`; of several classes each becomes a row, a choice between it and its absence.

    Raises:
        CalibrationError: there is nothing in the outputs to compare.
    """
    if kind == "causal" and "input_ids" not in batch:
        raise CalibrationError(
            f"the batch has {', '.join(batch)}, but no input_ids, by which the tokens to predict are known; add them"
        )
    found = targets_of(kind, batch, outputs)
    if isinstance(found, Hidden):
        return _rows(found.states, found.positions, False)
    positions, labels = found.positions, batch.get("labels")
    labels = labels[:, None] if labels is not None and labels.dim() == 1 else labels
    if kind != "causal" and labels is not None and labels.shape == positions.shape:  # causal: is in them already
        positions = positions & (labels != IGNORED)
    rows = _rows(found.logits, positions, found.logits.shape[-1] > 1 and choice != "numbers")
    return _each_class(rows) if choice == "several" else rows


def divergence_of(own: Counted, dense: Counted, temperature: float) -> Tensor:
    """How far a student's rows are from a teacher's, a float32 scalar: a mean over rows.

    KL divergence (see `logit_divergence`), or the relative squared error where the outputs are no distribution.

    Raises:
        CalibrationError: the two have rows of different sizes.
    """
    if own.values.shape != dense.values.shape:
        raise CalibrationError(
            f"the model predicts {tuple(own.values.shape)} (rows, classes) on a batch and the teacher "
            f"{tuple(dense.values.shape)}; a teacher needs the same head and the same vocabulary"
        )
    target = dense.values.to(own.values.device)
    if own.distribution:
        return logit_divergence(own.values, target, temperature)
    return state_error(own.values, target.float())


def some(rows: Counted) -> Counted:
    """The rows. Raises CalibrationError where there are none, for data that is there to be compared."""
    if not len(rows.values):
        raise CalibrationError("no prediction of the batch counts: every label is -100 or every token is padding")
    return rows


def _each_class(rows: Counted) -> Counted:
    """A logit z is the same distribution as the two logits (z, 0)."""
    logits = rows.values.reshape(-1, 1)
    classes = rows.values.shape[1]
    pairs = torch.cat([logits, torch.zeros_like(logits)], dim=1)
    return Counted(pairs, True, tuple(count * classes for count in rows.examples))


def _rows(values: Tensor, positions: Tensor, distribution: bool) -> Counted:
    return Counted(values[positions], distribution, tuple(positions.flatten(1).sum(1).tolist()))
