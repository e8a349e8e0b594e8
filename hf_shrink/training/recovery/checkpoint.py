"""`recover_checkpoint`: from a compressed folder and a dense one to a recovered folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from hf_shrink.calibration.data import CalibrationData, calibration_batches
from hf_shrink.checkpoint.adapters import ADAPTER, has_adapter
from hf_shrink.checkpoint.device import chosen_device
from hf_shrink.checkpoint.folder import OutputFolder
from hf_shrink.checkpoint.measured import Measured, fewer_tokens, load_measured
from hf_shrink.checkpoint.record import RECORD_NAME, ShrinkRecord, read_record
from hf_shrink.checkpoint.side_files import copy_side_files
from hf_shrink.checkpoint.source import load_processing, open_source
from hf_shrink.errors import CheckpointError, RecipeError
from hf_shrink.evaluation import stored_bytes
from hf_shrink.pipeline.measuring import measure
from hf_shrink.recipe import EvaluationSpec
from hf_shrink.reporting import write_report
from hf_shrink.reporting.card import DENSE_CARD
from hf_shrink.reporting.progress import Progress, showing, silence
from hf_shrink.sharding import together
from hf_shrink.training.recovery.recover import Recovered, recover


def recover_checkpoint(
    source: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    baseline: str | os.PathLike[str] | None = None,
    data: Any = "self",
    overwrite: bool = False,
    seed: int = 0,
    progress: bool | str | os.PathLike[str] = True,
    device: str | None = None,
    evaluation: EvaluationSpec | None = None,
    **options: Any,
) -> Recovered:
    """Recover a saved compressed model into a new folder, which has everything that the old one has.

    Figures of the report and the card are measured again. An adapter that cannot be merged lies in
    the folder `adapter` beside the weights (`load_adapter`). Where recovery did not help, the new folder holds the
    model as it was, and the report says so. In several processes all call this, see `recover`; the first writes.

    Args:
        source: folder of the compressed model.
        output_dir: must not exist, or be empty, unless `overwrite`; may be `source` then.
        baseline: folder or Hub id of the dense model; None: what the folder's shrink.json says it was made from.
        device: "cpu", "cuda" and so on; None: the accelerator where there is one.
        evaluation: what is measured again, and never learned from; None: what the recipe said, and what
            `EvaluationSpec()` says where a plan was given, which has none of its own.
        data, seed, progress, options: as in `recover`.

    Raises:
        CheckpointError: a model cannot be read, or the output not be written, or it would replace the dense model.
        RecipeError, ArchitectureError, CalibrationError: as in `recover`.
    """
    path = Path(source) / RECORD_NAME
    record = replace(read_record(path), card=None) if path.is_file() else None
    if baseline is None and record is None:
        raise CheckpointError(f"{source} does not say which dense model it was made from; give the baseline")
    if evaluation is not None and evaluation.metrics and record is None:
        raise CheckpointError(
            f"{source} has no {RECORD_NAME}, where figures would be written; leave the evaluation out, and measure the "
            "result with `hf-shrink evaluate`"
        )
    if has_adapter(Path(source)):
        raise CheckpointError(
            f"{source} has an adapter already; recover the folder that it was made from, or train the adapter further: "
            "load_adapter(..., trainable=True) and DistillationTrainer"
        )
    output = OutputFolder(output_dir, overwrite)
    place = open_source(source, dense=False).folder
    if Path(os.path.realpath(place)) != output.path:  # which may be replaced itself, but not be lost with its parent
        output.check_apart(place)
    output.check_apart(open_source(baseline or record.source, dense=False).folder)  # type: ignore[union-attr]
    with together() as here, ExitStack() as stack, silence(), showing(progress) as show:
        here.on_first(output.check)
        folder = stack.enter_context(output) if here.first else None
        where = str(chosen_device(device))
        found = load_measured(source, device=where)
        dense = load_measured(baseline or record.source, device=where)  # type: ignore[union-attr]
        if fewer_tokens(found):
            raise RecipeError(
                f"{source} has fewer tokens than {dense.source.name}, so their predictions cannot be compared; recover "
                "the model before its vocabulary is pruned"
            )
        processing = load_processing(found.source)
        spec = measured_before(record) if evaluation is None else evaluation
        held_out = None
        if spec.metrics:
            held_out = here.on_first(lambda: _held_out(spec, dense.model, processing, seed, show))
        result = recover(
            found.model,
            data=data,
            teacher=dense.model,
            tokenizer=processing,
            exclude=held_out.texts(processing) if held_out is not None and spec.data != "self" else None,
            seed=seed,
            progress=progress,
            **options,
        )
        if record is not None:
            _note(record, result, data, seed, options)
            if held_out is not None:
                measure(dense.model, found.model, held_out, spec, (processing, processing), record, show)
            elif result.adopted:  # figures of the model as it was are none of this one
                record.report.evaluation, record.report.completions = {}, []
        if isinstance(result.model, PeftModel):
            here.on_first(lambda: _save_adapter(result.model, folder, record))
            result.model.unload()
        here.on_first(lambda: _save(found, folder, record))
    return replace(result, model=found.model)


def measured_before(record: ShrinkRecord | None) -> EvaluationSpec:
    """What the folder says that was measured; nothing where it says nothing."""
    return EvaluationSpec(metrics=()) if record is None else EvaluationSpec(**record.recipe.get("evaluation", {}))


def _held_out(
    spec: EvaluationSpec, dense: PreTrainedModel, processing: Any, seed: int, show: Progress
) -> CalibrationData:
    """What the first run measured on, where it had the same seed."""
    return calibration_batches(spec, model=dense, tokenizer=processing, seed=seed, purpose="evaluation", progress=show)


def _note(record: ShrinkRecord, result: Recovered, data: Any, seed: int, options: Mapping[str, Any]) -> None:
    """What was done, for the report: in words, in seconds, and as what the command takes."""
    report = record.report
    report.notes.append(result.note)
    report.seconds["recover"] = result.seconds
    report.seconds["total"] = report.seconds.get("total", 0.0) + result.seconds
    if result.adopted:
        named = os.fspath(data) if isinstance(data, str | os.PathLike) else None
        plain = {key: value if isinstance(value, str | int | float) else "an object" for key, value in options.items()}
        report.recoveries.append({**plain, "data": named, "seed": seed})


def _save_adapter(adapted: PeftModel, folder: Path | None, record: ShrinkRecord | None) -> None:
    assert folder is not None
    adapted.save_pretrained(str(folder / ADAPTER))
    if record is not None:
        record.report.adapter = True
        record.report.bytes_after += stored_bytes(folder / ADAPTER)
        record.report.notes.append(
            f"the recovered model is the weights with the adapter in {ADAPTER}/: put it on with "
            f"hf_shrink.load_adapter(model, FOLDER + '/{ADAPTER}'); without it the model is as it was before"
        )


def _save(found: Measured, folder: Path | None, record: ShrinkRecord | None) -> None:
    """The weights, and everything else that the folder has."""
    assert folder is not None
    model = found.model
    if record is not None and hasattr(model, "shrink_record"):
        vars(model).update(shrink_record=record, shrink_report=record.report)
    model.save_pretrained(folder)
    copy_side_files(found.source, folder)  # its card is ours
    if record is not None:
        kept = found.source.folder / DENSE_CARD
        write_report(folder, record, source_card=kept.read_text(encoding="utf-8") if kept.is_file() else None)
        record.write(folder)
