"""What a model takes to run, as columns for metrics: seconds, bytes of weights, memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME

from hf_shrink.errors import ArchitectureError, CheckpointError
from hf_shrink.evaluation.machine import can_measure_memory
from hf_shrink.evaluation.made_up import made_up_inputs, reading_made_up
from hf_shrink.evaluation.memory import Load, measure_memory
from hf_shrink.evaluation.observed import Columns, Observed
from hf_shrink.evaluation.size import unique_bytes
from hf_shrink.evaluation.timing import in_turn, time_call

RUNS = 7
LENGTH = 128


def add_costs(observed: Observed, needed: Collection[str], models: Mapping[str, Any]) -> None:
    """Add the columns among `needed` to the sides of the models, which are called "model" and "baseline"."""
    sides = {"model": observed.model, "baseline": observed.baseline}
    if "seconds" in needed:
        _add_seconds(observed, sides, models)
    if "weight_bytes" in needed:
        observed.data["models"] = [1]
        for name, model in models.items():
            sides[name]["weight_bytes"] = [float(unique_bytes(model))]
    if "peak_bytes" in needed:
        _add_peaks(observed, sides, models)


def _add_seconds(observed: Observed, sides: Mapping[str, Columns], models: Mapping[str, Any]) -> None:
    try:
        inputs = {name: made_up_inputs(model, LENGTH) for name, model in models.items()}
        runs = {
            name: partial(time_call, partial(model, **inputs[name]), model.device) for name, model in models.items()
        }
        for name, run in runs.items():  # to warm up
            with reading_made_up(models[name]):
                run()
    except ArchitectureError as error:
        observed.missing["seconds"] = str(error)
        return
    timed = in_turn(runs, RUNS)
    observed.data["passes"] = [1.0] * RUNS
    for name, seconds in timed.items():
        sides[name]["seconds"] = [one.wall for one in seconds]


def _add_peaks(observed: Observed, sides: Mapping[str, Columns], models: Mapping[str, Any]) -> None:
    folders = {name: folder for name, model in models.items() if (folder := _folder(model)) is not None}
    if not can_measure_memory():
        observed.missing["peak_bytes"] = "memory is only counted on Linux"
        return
    if "model" not in folders:
        observed.missing["peak_bytes"] = (
            "memory is counted in a process of its own, which takes a folder with the model as it is: save it, and "
            "measure what is loaded from there"
        )
        return
    try:
        peaks = {name: measure_memory(Load(str(folder), length=LENGTH)).peak for name, folder in folders.items()}
    except CheckpointError as error:
        observed.missing["peak_bytes"] = str(error)
        return
    observed.data["processes"] = [1]
    for name, peak in peaks.items():
        sides[name]["peak_bytes"] = [float(peak)]


def _folder(model: Any) -> Path | None:
    """The folder that the model lies in, unless that holds what it was shrunk from since it was loaded."""
    name = str(getattr(model, "name_or_path", "") or "")
    if not name or not Path(name, CONFIG_NAME).is_file():
        return None
    record = getattr(model, "shrink_record", None)
    if record is not None and Path(record.source).expanduser().resolve() == Path(name).resolve():
        return None
    return Path(name)
