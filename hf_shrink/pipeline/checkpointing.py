"""`shrink_checkpoint`: from a folder or Hub id to an output folder with everything in it, one block at a time."""

from __future__ import annotations

import copy
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_shrink.calibration.data import CalibrationData, calibration_batches
from hf_shrink.calibration.inputs import tokenizer_of
from hf_shrink.calibration.recipes import data_files
from hf_shrink.checkpoint.device import chosen_device, settle
from hf_shrink.checkpoint.fingerprint import digest, fingerprint
from hf_shrink.checkpoint.left_out import LeftOut, left_out
from hf_shrink.checkpoint.record import RECORD_NAME, ShrinkRecord, current_versions, named, read_record
from hf_shrink.checkpoint.run_folder import RunFolder
from hf_shrink.checkpoint.save import bind as bind_save
from hf_shrink.checkpoint.side_files import copy_side_files
from hf_shrink.checkpoint.source import Source, load_processing, open_source
from hf_shrink.checkpoint.streamed import load_streamed
from hf_shrink.evaluation import stored_bytes
from hf_shrink.pipeline.foreseen import foreseen
from hf_shrink.pipeline.keeping import JournalKeeper, Keeper
from hf_shrink.pipeline.measuring import measure
from hf_shrink.pipeline.recalled import Recalled
from hf_shrink.pipeline.recipes import DEFAULT_RECIPE, RecipeLike, calibration_of, load_recipe, vocabulary_texts
from hf_shrink.pipeline.shrinking import Job, evaluating
from hf_shrink.plan import Plan
from hf_shrink.recall import recalling
from hf_shrink.recipe import EvaluationSpec, Recipe
from hf_shrink.report import ShrinkReport
from hf_shrink.reporting import write_report
from hf_shrink.reporting.progress import Progress, showing, silence
from hf_shrink.residence import bytes_of
from hf_shrink.sharding import ranks, together

MAX_MEMORY = "4GB"


def shrink_checkpoint(
    source: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    recipe: RecipeLike | Plan = DEFAULT_RECIPE,
    *,
    tokenizer: Any = None,
    calibration: Any = None,
    evaluation: EvaluationSpec | None = None,
    seed: int = 0,
    overwrite: bool = False,
    resume: bool = True,
    max_memory: int | str = MAX_MEMORY,
    progress: bool | str | os.PathLike[str] = True,
    device: str | None = None,
) -> ShrinkReport:
    """Shrink a saved model into a new folder: weights, config, tokenizer, card, report, plots.

    The weights are those that `shrink` gives on that device, byte for byte. On an accelerator the whole model is worked
    on there, where it fits; otherwise, and on the CPU, one block of it is in memory at a time. The
    folder is written beside its final place and renamed when it is whole. A run that was cut off goes on after the last
    block that it finished when it is started again in the same way. The result is measured against the dense model as
    the recipe's `evaluation` says, on data that overlaps neither in seed nor in text with the calibration.

    In processes that accelerate or torchrun started, all of them call this; they share the work, and the first writes.
    An interrupted run goes on with as many processes as it had.

    Args:
        source: folder or Hub id of a dense model in safetensors.
        output_dir: must not exist, or be empty, unless `overwrite`.
        recipe, calibration, seed: as in `shrink`.
        evaluation: in place of the recipe's; a plan has none of its own, and is measured as `EvaluationSpec()` says.
        progress: show progress bars, or the path of a file that gets a line now and then instead.
        tokenizer: in place of the source's own tokenizer or processor; rewritten in place where the recipe prunes the
            vocabulary.
        resume: go on from what an earlier run with this output left; False: delete that.
        max_memory: bytes, or such as "4GB": what activations may take of memory before they go to a file, and weights
            where all of them fit in half of it. Changes no result.
        device: "cpu", "cuda", "cuda:1" and so on; None: the accelerator, where there is one. A model that does not fit
            it comes there block by block.

    Raises:
        CheckpointError: the source cannot be read or the output cannot be written; what an earlier run left is of
            another recipe, seed, source or device.
        RecipeError, ArchitectureError, CalibrationError: as in `shrink`; ArchitectureError also where there is no such
            device, or the model does not fit it.
    """
    since = time.perf_counter()
    asked = recipe if isinstance(recipe, Plan) else load_recipe(recipe)
    if evaluation is not None and isinstance(asked, Recipe):
        asked = replace(asked, evaluation=evaluation)
    spec = asked.evaluation if isinstance(asked, Recipe) else evaluation or EvaluationSpec()
    memory = bytes_of(max_memory)
    found = open_source(source)
    with (
        together(),
        RunFolder(output_dir, overwrite, resume, found.folder) as run,
        silence(),
        showing(progress) as show,
    ):
        processing = tokenizer if tokenizer is not None else load_processing(found)
        model = None if found.shards else load_streamed(found, run.scratch, memory)  # of the Hub: fetched first
        where = chosen_device(device)
        key = ranks().on_first(lambda: _key(found, asked, spec, tokenizer, calibration, seed, where))
        journal = run.journal({**key, "processes": ranks().size})
        if run.whole:
            return ranks().on_first(lambda: read_record(run.target / RECORD_NAME).report)
        model = load_streamed(found, run.scratch, memory) if model is None else model
        without = left_out(found, model)
        notes = [note for note in (without.note, settle(model, where, asked=device is not None)) if note is not None]
        for note in notes:
            show.say(note)
        keeper = JournalKeeper(journal, run.finished, lambda: time.perf_counter() - since, memory, show.say)
        job = Job(model, asked, processing, calibration, seed, show, keeper=keeper)
        keeper.foresee(model, foreseen(model, asked))
        with evaluating(model):
            held_out = _held_out(spec, model, processing, seed, show, keeper)
            job.exclude = held_out.texts(processing) if held_out is not None and spec.data != "self" else None
            before = copy.deepcopy(processing)  # its tokens, where the run takes some out
            with recalling(Recalled(run.finished)):
                record = replace(job.run(job.data()), source=named(found.name))
        record.report.notes += notes
        bind_save(model, record)
        source_card = ranks().on_first(lambda: _save(model, found, record, run.output))
        model.name_or_path = str(run.output)  # where what it became is found, to be measured
        record.report.bytes_before = _source_bytes(found, without, record.report.bytes_before)
        record.report.bytes_after = ranks().on_first(lambda: stored_bytes(run.output))
        if held_out is not None:
            dense = load_streamed(found, run.scratch / "dense", memory, check=False)
            settle(dense, where, asked=False)
            measure(dense, model, held_out, spec, (processing, before), record, show)
            del dense
        ranks().on_first(lambda: _describe(record, run.output, source_card))
    return record.report


def _save(model: PreTrainedModel, found: Source, record: ShrinkRecord, output: Path) -> str | None:
    """Write the model, and what lies beside the source's weights; returns the source's model card."""
    model.save_pretrained(output)
    return copy_side_files(found, output, tokens=record.tokenizer is None)


def _describe(record: ShrinkRecord, output: Path, source_card: str | None) -> None:
    write_report(output, record, source_card=source_card)
    record.write(output)


@contextmanager
def open_checkpoint(
    source: str | os.PathLike[str],
    max_memory: int | str = MAX_MEMORY,
    device: str | None = None,
    say: Callable[[str], None] = print,
) -> Iterator[tuple[PreTrainedModel, Any]]:
    """A saved model, on the CPU one block of it in memory at a time, to make plans of, and its tokenizer or processor.

    Arguments and errors as in `shrink_checkpoint`; `say` is told where the model is not on the accelerator whole, and
    which tensors its class has no place for.
    """
    found = open_source(source)
    with tempfile.TemporaryDirectory() as scratch:
        with silence():
            processing, model = load_processing(found), load_streamed(found, Path(scratch), bytes_of(max_memory))
            notes = [left_out(found, model).note, settle(model, chosen_device(device), asked=device is not None)]
        for note in filter(None, notes):
            say(note)
        yield model, processing


def _key(
    found: Source,
    asked: Recipe | Plan,
    spec: EvaluationSpec,
    tokenizer: Any,
    calibration: Any,
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    """What decides a run's result, as JSON values."""
    text = getattr(getattr(tokenizer_of(tokenizer), "backend_tokenizer", None), "to_str", lambda: None)()
    data = calibration_of(asked).data if calibration is None else calibration
    name = os.fspath(data) if isinstance(data, str | os.PathLike) else None
    names = [name, spec.data if spec.metrics else None, *(vocabulary_texts(asked) if isinstance(asked, Recipe) else ())]
    files = [file for name in filter(None, names) for file in data_files(name)]
    return {
        "source": fingerprint(found),
        "recipe": asked.to_dict() if isinstance(asked, Recipe) else {"plan": asked.to_json()},
        "seed": seed,
        "tokenizer": text,
        "calibration": name,
        "evaluation": asdict(spec),
        **{f"file {file}": digest(file) for file in files},
        "versions": current_versions(),
        "threads": torch.get_num_threads(),
        "device": device.type,
    }


def _held_out(
    spec: EvaluationSpec, model: PreTrainedModel, processing: Any, seed: int, show: Progress, keeper: Keeper
) -> CalibrationData | None:
    """What the result will be measured on, made before the model changes; None when nothing is to be measured."""
    if not spec.metrics:
        return None

    def make() -> CalibrationData:
        return calibration_batches(
            spec, model=model, tokenizer=processing, seed=seed, purpose="evaluation", progress=show
        )

    return keeper.data("evaluation", lambda: ranks().on_first(make), named=True)


def _source_bytes(source: Source, without: LeftOut, loaded: int) -> int:
    """Bytes of the source's weights on disk where they are at hand, without those left out; else as loaded."""
    if not source.shards:
        return loaded
    return sum(shard.stat().st_size for shard in source.shards) - without.bytes - without.ignored
