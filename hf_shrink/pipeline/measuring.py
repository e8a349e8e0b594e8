"""Quality and speed of a shrunken model beside the dense one, into its report."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from hf_shrink.calibration.data import CalibrationData
from hf_shrink.calibration.inputs import tokenizer_of
from hf_shrink.checkpoint.inference import optimize_for_inference
from hf_shrink.checkpoint.record import ShrinkRecord
from hf_shrink.errors import ShrinkError
from hf_shrink.evaluation import compare_decode_speed, evaluate_model, for_report, greedy_completion
from hf_shrink.recipe import EvaluationSpec
from hf_shrink.reporting.progress import Progress
from hf_shrink.residence import residence_of
from hf_shrink.sharding import ranks

SPEED_TOKENS = 16  # of the prompt and decoded, a run: enough for a figure, not for a wait
# An opinion, a reason, a list: to look at, not to measure by.
PROMPTS = (
    "The most important thing to know about the sea is",
    "Leaves turn red in autumn because",
    "To bake a loaf of bread, follow these steps:\n1.",
)
NEW_TOKENS = 40  # after each


def measure(
    dense: PreTrainedModel,
    model: PreTrainedModel,
    held_out: CalibrationData,
    spec: EvaluationSpec,
    processing: tuple[Any, Any],
    record: ShrinkRecord,
    show: Progress,
) -> None:
    """Measure `model` beside `dense`. `processing`: after the run, and before."""
    model.eval()
    rests = any((residence := residence_of(m)) is not None and residence.rests for m in (dense, model))
    if not rests:
        optimize_for_inference(model)
    result = evaluate_model(
        model,
        held_out,
        baseline=dense,
        metrics=spec.metrics,
        tokenizer=processing[0],
        baseline_tokenizer=processing[1] if record.tokenizer is not None else None,
        progress=show,
    )
    speed = None
    if rests:
        record.report.notes.append(
            "speed was not measured, and no text was written: a model is larger than half of max_memory, or than the "
            "accelerator, and bringing its blocks for every token says nothing; see `hf-shrink bench`"
        )
    else:
        show("comparing speed", 0, 1)
        speed, reason = ranks().on_first(lambda: _speed(dense, model))
        if reason:
            record.report.notes.append(f"speed was not measured: {reason}")
        show("comparing speed", 1, 1)
    record.report.evaluation = for_report(result, speed)
    record.report.completions = []
    writer, dense_writer = map(tokenizer_of, processing)
    if speed is not None and dense.can_generate() and not dense.config.is_encoder_decoder and writer is not None:
        sides = {"dense": (dense, dense_writer), "compressed": (model, writer)}
        for done, prompt in enumerate(PROMPTS):
            show("comparing completions", done, len(PROMPTS))
            record.report.completions.append(ranks().on_first(functools.partial(_completions, prompt, sides)))
        show("comparing completions", len(PROMPTS), len(PROMPTS))


def _speed(dense: PreTrainedModel, model: PreTrainedModel) -> tuple[dict[str, Any] | None, str]:
    """The speed of both; where it cannot be measured None, and why."""
    try:
        return compare_decode_speed(dense, model, prompt=SPEED_TOKENS, new=SPEED_TOKENS), ""
    except ShrinkError as error:
        return None, str(error)
    except Exception as error:  # whatever it is: all the work of the run is done by now
        return None, " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _completions(prompt: str, sides: Mapping[str, tuple[PreTrainedModel, Any]]) -> dict[str, str]:
    """A prompt, and how each model, with its tokenizer, goes on."""
    written = {name: greedy_completion(*side, prompt, new=NEW_TOKENS) for name, side in sides.items()}
    return {"prompt": prompt, **written}
