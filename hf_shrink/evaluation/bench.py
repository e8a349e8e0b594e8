"""A checkpoint's speed and memory beside the dense model's: `hf-shrink bench`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from hf_shrink.checkpoint.device import chosen_device, free_on
from hf_shrink.checkpoint.measured import load_measured, source_skeleton
from hf_shrink.checkpoint.record import RECORD_NAME, current_versions, read_record
from hf_shrink.checkpoint.source import Source, open_source
from hf_shrink.errors import CheckpointError
from hf_shrink.evaluation.machine import available_bytes, can_measure_memory, hardware
from hf_shrink.evaluation.memory import Load, measure_memory
from hf_shrink.evaluation.size import unique_bytes
from hf_shrink.evaluation.speed import Workload, measure_speed
from hf_shrink.progress import ProgressCallback, quiet
from hf_shrink.reporting.figures import size
from hf_shrink.runtime.optimizing import kernel_summary
from hf_shrink.speed_report import Memory, ModelSpeed, SpeedReport

COMPRESSED, COMPILED = "compressed", "compressed, compiled"
DENSE_DTYPES = ("float32", "bfloat16")
ROOM = 0.9  # of the free memory may be filled with weights; the rest is for activations and caches


def bench_checkpoint(
    folder: str | os.PathLike[str],
    *,
    baseline: str | os.PathLike[str] | None = None,
    dtype: str = "auto",
    dense_dtypes: Sequence[str] = DENSE_DTYPES,
    workload: Workload | None = None,
    compiled: bool = False,
    memory: bool = True,
    device: str | None = None,
    threads: int | None = None,
    progress: ProgressCallback = quiet,
) -> SpeedReport:
    """Measure a checkpoint as `from_pretrained` loads it, and the dense model that it was made from.

    All models are in this process at once and run in turn. Memory is measured in processes of their own.

    Args:
        folder: folder or Hub id of the checkpoint.
        baseline: of the dense model; None for the one that shrink.json names, where it is on this machine.
        dtype: of the checkpoint's activations, by torch's name; "auto" for the stored one.
        dense_dtypes: in which the dense model is measured.
        workload: what is run; None for the default one.
        compiled: measure the checkpoint with `torch.compile` as well.
        memory: measure memory, which loads every model once more.
        device: None for the accelerator where there is one, else the CPU.
        threads: torch's on the CPU; None leaves them as they are.
        progress: called with (what, done, total).

    Returns:
        The dense models and "compressed" by name. What could not be measured is in its notes.

    Raises:
        CheckpointError: a model cannot be found or loaded.
        RecipeError: the workload times nothing.
        ArchitectureError: the model reads what cannot be made up, or there is no such device.
    """
    workload = workload or Workload()
    device = str(chosen_device(device))
    source = open_source(folder, dense=False)
    dense, notes = _dense_source(source, baseline)
    places = [_Place(f"dense {name}", dense, name) for name in dense_dtypes if dense is not None]
    places = [*_fitting(places, device, notes), _Place(COMPRESSED, source, dtype)]
    with _threads(threads):
        # First of all: later this process holds all models, and the others might find no room.
        taken = _memories(places, device, workload, notes, progress) if memory else {}
        models = _load(places, device, progress)
        if compiled:
            models[COMPILED] = models[COMPRESSED]
        workload = workload.fitted(models.values())
        timings = measure_speed(models, workload, compiled={COMPILED}, progress=progress)
        speeds = {
            name: ModelSpeed(
                dtype=str(model.dtype).removeprefix("torch."),
                weight_bytes=unique_bytes(model),
                timings=timings[name],
                memory=taken.get(name),
                kernels={kernel: len(paths) for kernel, paths in kernel_summary(model).items()},
            )
            for name, model in models.items()
        }
        about = {"date": time.strftime("%Y-%m-%d"), "versions": current_versions(), "hardware": _hardware(device)}
        return SpeedReport(source.name, speeds, asdict(workload), device, torch.get_num_threads(), about, notes)


@dataclass(frozen=True)
class _Place:
    """One way to load one of the two models."""

    name: str
    source: Source
    dtype: str

    @property
    def where(self) -> str:
        return str(self.source.folder) if self.source.shards else self.source.name


def _hardware(device: str) -> dict[str, Any]:
    found = hardware()
    if device.startswith("cuda"):
        found["accelerator"] = torch.cuda.get_device_name(device)
    return found


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def _dense_source(source: Source, baseline: str | os.PathLike[str] | None) -> tuple[Source | None, list[str]]:
    """The dense model where it is known and here, and else a note that says why there is none.

    What was asked for may be fetched from the Hub, what a record only mentions may not.
    """
    if baseline is not None:
        return open_source(baseline), []
    alone = "the compressed model is measured alone"
    path = source.folder / RECORD_NAME
    if not path.is_file():
        return None, [f"{alone}: it has no {RECORD_NAME} that names its dense model; give the baseline"]
    name = read_record(path).source
    if not Path(name).is_dir():
        return None, [f"{alone}: its dense model {name} is no folder here; give the baseline to fetch or to find it"]
    return open_source(name), []


def _fitting(places: Sequence[_Place], device: str, notes: list[str]) -> list[_Place]:
    """The dense ones that memory has room for, all at once; a note for each that is left out."""
    free = _free_bytes(device)
    kept, left = [], None if free is None else ROOM * free
    for place in places:
        needed = _bytes_needed(place)
        if left is not None and needed > left:
            notes.append(f"{place.name} is not measured: its {size(needed)} do not fit the {size(left)} that are free")
            continue
        left = None if left is None else left - needed
        kept.append(place)
    return kept


def _load(places: Sequence[_Place], device: str, progress: ProgressCallback) -> dict[str, Any]:
    """The models by name."""
    loaded: dict[str, Any] = {}
    progress("loading", 0, len(places))
    for place in places:
        loaded[place.name] = load_measured(place.where, place.dtype, device).model
        progress("loading", len(loaded), len(places))
    return loaded


def _bytes_needed(place: _Place) -> int:
    """Of a dense model's weights in the dtype that it is to be loaded in."""
    elements = sum(prod(parameter.shape) for parameter in source_skeleton(place.source).parameters())
    dtype: torch.dtype = getattr(torch, place.dtype)
    return int(elements * dtype.itemsize)


def _free_bytes(device: str) -> int | None:
    return available_bytes() if device == "cpu" else free_on(torch.device(device))


def _memories(
    places: Sequence[_Place], device: str, workload: Workload, notes: list[str], progress: ProgressCallback
) -> dict[str, Memory]:
    """What each takes in a process of its own, by name."""
    if not can_measure_memory():
        notes.append("memory is not measured: only Linux tells what a process has resident")
        return {}
    found: dict[str, Memory] = {}
    for done, place in enumerate(places):
        progress("measuring memory", done, len(places))
        load = Load(place.where, place.dtype, device, torch.get_num_threads(), workload.prompt)
        try:
            found[place.name] = measure_memory(load)
        except CheckpointError as error:
            notes.append(f"the memory of {place.name} is not measured: {error}")
    progress("measuring memory", len(places), len(places))
    return found
