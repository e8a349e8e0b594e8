"""A run's tuning: what the dense model says is kept before anything changes, the compressed one is tuned in the end."""

from __future__ import annotations

from contextlib import nullcontext

from torch import nn
from transformers import PreTrainedModel

from hf_shrink.calibration.data import CalibrationData
from hf_shrink.errors import CalibrationError, RecipeError
from hf_shrink.progress import ProgressCallback
from hf_shrink.residence import residence_of, visited
from hf_shrink.sharding import ranks
from hf_shrink.tuning import Teacher, Tuning, own_text, regrouped, spread_evenly, tune

NO_OWN_TEXT = "tuning saw calibration data alone, since this model writes no text"


def teacher_of(
    model: nn.Module,
    tuning: Tuning,
    data: CalibrationData,
    tokenizer: object | None,
    seed: int,
    progress: ProgressCallback,
    notes: list[str],
) -> Teacher | None:
    """What the dense model says; None but in the first process, whose work tuning is.

    Args:
        notes: get another line where the model was asked for text of its own.

    Raises:
        CalibrationError: no data, or not a transformers model.
        RecipeError: the model does not fit the accelerator.
    """
    if not isinstance(model, PreTrainedModel) or not data.batches:
        raise CalibrationError("tune works on transformers models with calibration data")
    if visited(model):
        raise RecipeError(
            "tune trains the whole model at once, and it does not fit the accelerator; leave tune out (effort: "
            "balanced), or take --device cpu (device='cpu')"
        )
    if not ranks().first:
        return None
    batches = regrouped(data.batches, tuning.tokens)
    if tuning.own_text and data.details.get("source") != "self":
        residence = residence_of(model)
        with nullcontext() if residence is None else residence.awake():  # it runs as a whole for every token
            own = own_text(model, data.batches, tuning, tokenizer, seed, progress)
        batches = spread_evenly(batches, regrouped(own, tuning.tokens))
        tokens = sum(batch["input_ids"].numel() for batch in own)
        what = f"tuning also saw {tokens:,} tokens that the model wrote" if own else NO_OWN_TEXT
        notes.append(f"{what} (tune.own_text)")
    return Teacher(model, batches, progress)


def tune_whole(
    model: nn.Module, tuning: Tuning, teacher: Teacher | None, seed: int, progress: ProgressCallback
) -> list[str]:
    """Tune the model in place; returns notes."""
    assert isinstance(model, PreTrainedModel)

    def work() -> list[str]:
        assert teacher is not None
        return list(tune(model, teacher, tuning, seed, progress).notes)

    residence = residence_of(model)
    with nullcontext() if residence is None else residence.awake():
        notes = ranks().on_first(work)
        ranks().copy_first(*model.parameters(), *model.buffers())
    return notes
