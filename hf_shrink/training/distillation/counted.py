"""The predictions of one forward pass that count, whatever the task head puts out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_shrink.calibration.targets import IGNORED, Batch, Hidden, Kind, targets_of
from hf_shrink.errors import CalibrationError
from hf_shrink.tuning.divergence import logit_divergence, state_error


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


def counted(kind: Kind, batch: Batch, outputs: Any, model: nn.Module) -> Counted:
    """The rows of a model's outputs that count: real tokens that are predicted, and of these such as have a label
    where the batch has labels of that shape (-100: none).

    Args:
        kind: how the model is scored, see `kind_by_labels`; of several classes each is a row, a choice between it and
            its absence.
        batch: with what the model was called, labels included.
        model: whose outputs they are.

    Raises:
        CalibrationError: there is nothing in the outputs to compare.
    """
    if kind == "causal" and "input_ids" not in batch:
        raise CalibrationError(
            f"the batch has {', '.join(batch)}, but no input_ids, by which the tokens to predict are known; add them"
        )
    found = targets_of(kind, batch, outputs, model)
    if isinstance(found, Hidden):
        return _rows(found.states, found.positions, False)
    positions, labels = found.positions, batch.get("labels")
    labels = labels[:, None] if labels is not None and labels.dim() == 1 else labels
    chosen = labels is not None and not labels.is_floating_point() and labels.shape == positions.shape
    if chosen and kind != "causal":  # there it is in them already
        positions = positions & (labels != IGNORED)
    return _rows(found.logits, positions, found.logits.shape[-1] > 1)


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


def _rows(values: Tensor, positions: Tensor, distribution: bool) -> Counted:
    return Counted(values[positions], distribution, tuple(positions.flatten(1).sum(1).tolist()))
