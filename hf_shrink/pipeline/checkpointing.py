"""`shrink_checkpoint`: from a folder or Hub id to an output folder with everything in it."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_shrink.calibration.data import CalibrationData, calibration_batches
from hf_shrink.calibration.inputs import tokenizer_of
from hf_shrink.checkpoint.folder import OutputFolder, copy_side_files
from hf_shrink.checkpoint.inference import optimize_for_inference
from hf_shrink.checkpoint.record import ShrinkRecord
from hf_shrink.checkpoint.save import bind as bind_save
from hf_shrink.checkpoint.source import Source, load_processing, load_source_model, open_source
from hf_shrink.evaluation import compare_decode_speed, evaluate_model, for_report, greedy_completion, stored_bytes
from hf_shrink.pipeline.recipes import DEFAULT_RECIPE, RecipeLike, load_recipe
from hf_shrink.pipeline.shrinking import Job, evaluating
from hf_shrink.plan import Plan
from hf_shrink.recipe import EvaluationSpec
from hf_shrink.report import ShrinkReport
from hf_shrink.reporting import write_report
from hf_shrink.reporting.progress import Progress, silence

SPEED_TOKENS = 16  # of the prompt and decoded, a run: enough for a figure, not for a wait
PROMPT = "The most important thing to know about the sea is"


def shrink_checkpoint(
    source: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    recipe: RecipeLike | Plan = DEFAULT_RECIPE,
    *,
    tokenizer: Any = None,
    calibration: Any = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> ShrinkReport:
    """Shrink a saved model into a new folder: weights, config, tokenizer, card, report, plots.

    The folder is written beside its final place and renamed when it is whole. The result is measured against the dense
    model as the recipe's `evaluation` says, on data that overlaps neither in seed nor in text with the calibration.

    Args:
        source: folder or Hub id of a dense model in safetensors.
        output_dir: must not exist, or be empty, unless `overwrite`.
        recipe, calibration, seed, progress: as in `shrink`.
        tokenizer: in place of the source's own tokenizer or processor; rewritten in place where the recipe prunes the
            vocabulary.

    Raises:
        CheckpointError: the source cannot be read or the output cannot be written.
        RecipeError, ArchitectureError, CalibrationError: as in `shrink`.
    """
    asked = recipe if isinstance(recipe, Plan) else load_recipe(recipe)
    spec = EvaluationSpec() if isinstance(asked, Plan) else asked.evaluation
    found = open_source(source)
    with OutputFolder(output_dir, overwrite=overwrite) as folder, silence():
        processing = tokenizer if tokenizer is not None else load_processing(found)
        model = load_source_model(found)
        show = Progress(quiet=not progress)
        job = Job(model, asked, processing, calibration, seed, progress)
        with evaluating(model):
            held_out = _held_out(spec, model, processing, seed, show)
            job.exclude = held_out.texts(processing) if held_out is not None and spec.data != "self" else None
            before = copy.deepcopy(processing)  # its tokens, where the run takes some out
            record = replace(job.run(job.data()), source=found.name)
        bind_save(model, record)
        model.save_pretrained(folder)
        source_card = copy_side_files(found, folder, tokens=record.tokenizer is None)
        record.report.bytes_before = _source_bytes(found, record.report.bytes_before)
        record.report.bytes_after = stored_bytes(folder)
        if held_out is not None:
            _measure(found, model, held_out, spec, (processing, before), record, show)
        show.close()
        write_report(folder, record, source_card=source_card)
        record.write(Path(folder))
    return record.report


def _held_out(
    spec: EvaluationSpec, model: PreTrainedModel, processing: Any, seed: int, show: Progress
) -> CalibrationData | None:
    """What the result will be measured on, made before the model changes; None when nothing is to be measured."""
    if not spec.metrics:
        return None
    return calibration_batches(spec, model=model, tokenizer=processing, seed=seed, purpose="evaluation", progress=show)


def _source_bytes(source: Source, loaded: int) -> int:
    """Bytes of the source's weights on disk where they are at hand, else as loaded."""
    return sum(shard.stat().st_size for shard in source.shards) or loaded


def _measure(
    source: Source,
    model: PreTrainedModel,
    held_out: CalibrationData,
    spec: EvaluationSpec,
    processing: tuple[Any, Any],
    record: ShrinkRecord,
    show: Progress,
) -> None:
    """Quality and speed beside the dense model, into the record's report. `processing`: after the run, and before."""
    dense = load_source_model(source)
    optimize_for_inference(model.eval())
    result = evaluate_model(
        model,
        held_out,
        baseline=dense,
        metrics=spec.metrics,
        tokenizer=processing[0],
        baseline_tokenizer=processing[1] if record.tokenizer is not None else None,
        progress=show,
    )
    show("comparing speed", 0, 1)
    speed = compare_decode_speed(dense, model, prompt=SPEED_TOKENS, new=SPEED_TOKENS)
    show("comparing speed", 1, 1)
    record.report.evaluation = for_report(result, speed)
    writer, dense_writer = map(tokenizer_of, processing)
    if dense.can_generate() and not dense.config.is_encoder_decoder and writer is not None:
        show("comparing completions", 0, 2)
        record.report.completions = {
            "prompt": PROMPT,
            "dense": greedy_completion(dense, dense_writer, PROMPT),
            "compressed": greedy_completion(model, writer, PROMPT),
        }
        show("comparing completions", 2, 2)
