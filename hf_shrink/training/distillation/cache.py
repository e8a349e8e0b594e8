"""A teacher's predictions on disk, so that the teacher need not be in memory while the student is trained."""

from __future__ import annotations

import bisect
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, default_data_collator

from hf_shrink.calibration.padding import token_mask
from hf_shrink.calibration.targets import Kind, kind_by_labels, kind_of, model_inputs
from hf_shrink.checkpoint.folder import OutputFolder
from hf_shrink.errors import CalibrationError, CheckpointError
from hf_shrink.modes import modes_kept
from hf_shrink.progress import ProgressCallback, quiet
from hf_shrink.training.distillation.counted import Counted, counted, some
from hf_shrink.tuning.divergence import Largest, largest

INDEX_NAME = "teacher.json"
FORMAT = 1
SHARD_ROWS = 2**16  # predictions in a file
_NARROW = 2**16  # classes whose numbers fit in 16 bits


@dataclass(frozen=True)
class CacheIndex:
    """What teacher.json says.

    Attributes:
        teacher: name of the model.
        classes: how many it chooses between.
        k: how many of them are kept of a prediction.
        temperature: that its logits were divided by.
        shards: file names, and the number of the first example in each.
        examples: how many there are.
    """

    teacher: str
    classes: int
    k: int
    temperature: float
    shards: tuple[tuple[str, int], ...]
    examples: int
    format: int = FORMAT


def cache_teacher(
    teacher: PreTrainedModel,
    dataset: Any,
    folder: str | os.PathLike[str],
    *,
    k: int = 64,
    temperature: float = 1.0,
    data_collator: Callable[[list[Any]], Mapping[str, Any]] = default_data_collator,
    batch_size: int = 8,
    progress: ProgressCallback = quiet,
) -> CachedTeacher:
    """Write a teacher's predictions on a data set: of each the k largest probabilities, and the mass of the others.

    The folder is there when it is whole, or not at all. A prediction takes 6 k + 4 bytes with more than 65,536 classes,
    4 k + 4 else. Pass the folder, or what this returns, to `DistillationTrainer` with the same data set as
    `train_dataset`: examples are found by their number in it.

    Args:
        teacher: any model with logits. Runs as it is: dtype, device, and in eval mode.
        dataset: map-style, with the columns that the model takes and no others; with labels, predictions without one
            (-100) are left out. Examples must be the same every time: no augmentation, no masks drawn anew.
        folder: must not exist, or be empty.
        k: at most all classes.
        temperature: of the training that is to come.

    Raises:
        CalibrationError: the teacher puts out no logits, k is not a number of classes, or nothing counts in a batch.
        CheckpointError: the folder cannot be written.
    """
    if k < 1 or temperature <= 0:
        raise CalibrationError(f"k must be at least 1 and temperature above 0, not {k!r} and {temperature!r}")
    kind, writer = kind_of(teacher), None
    with modes_kept(teacher), OutputFolder(folder) as partial, torch.no_grad():
        teacher.eval()
        for first in range(0, len(dataset), batch_size):
            numbers = range(first, min(first + batch_size, len(dataset)))
            batch = dict(data_collator([dataset[number] for number in numbers]))
            batch = {key: v.to(teacher.device) if isinstance(v, Tensor) else v for key, v in batch.items()}
            outputs = teacher(**model_inputs(kind, batch))
            known = kind_by_labels(kind, batch, outputs, teacher)
            rows = some(counted(known, batch, outputs, teacher))
            if writer is None:
                _check_cacheable(known, rows, batch, k)
                writer = _Writer(partial, rows.values.shape[1], k, temperature)
            writer.add(rows, fingerprints(teacher, batch))
            progress("caching the teacher", numbers.stop, len(dataset))
        if writer is None:
            raise CalibrationError("the data set is empty; give at least one example")
        writer.finish(str(getattr(teacher.config, "_name_or_path", "") or type(teacher).__name__))
    return CachedTeacher(folder)


class CachedTeacher:
    """Reads what `cache_teacher` wrote, by the number of the example; files stay mapped, not in memory.

    Attributes:
        index: what the cache says of itself.

    Raises:
        CheckpointError: the folder holds no such cache, or a file of it is missing or damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        path = self.folder / INDEX_NAME
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            shards = tuple((str(name), int(first)) for name, first in found.pop("shards"))
            self.index = CacheIndex(**found, shards=shards)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{folder} holds no predictions of a teacher ({error}); make some with cache_teacher()"
            ) from error
        if self.index.format != FORMAT:
            raise CheckpointError(f"{path} has the format {self.index.format}, not {FORMAT}; run cache_teacher() again")
        self._check_shards()
        self._open: dict[int, Any] = {}

    def _check_shards(self) -> None:
        for name, _ in self.index.shards:
            try:
                with safe_open(self.folder / name, framework="pt"):
                    pass  # its header says how long it must be
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"cannot read {self.folder / name}: {error}; run cache_teacher() again"
                ) from error

    def __len__(self) -> int:
        return self.index.examples

    def read(self, numbers: Sequence[int], rows: Counted, prints: Sequence[int]) -> Largest:
        """The teacher's predictions for a batch, on the student's device, row beside row.

        Args:
            numbers: of the batch's examples in the data set.
            rows: the student's predictions.
            prints: `fingerprints` of the batch.

        Raises:
            CalibrationError: an example is not the one that the teacher saw, or the student has other classes.
        """
        if rows.values.shape[1] != self.index.classes:
            raise CalibrationError(
                f"the model chooses between {rows.values.shape[1]} classes and the teacher in {self.folder} between "
                f"{self.index.classes}; a teacher needs the same head and the same vocabulary"
            )
        parts = [
            self._example(number, count, seen)
            for number, count, seen in zip(numbers, rows.examples, prints, strict=True)
        ]
        device = rows.values.device
        return Largest(
            torch.cat([part.probabilities for part in parts]).float().to(device),
            torch.cat([part.indices for part in parts]).long().to(device),
            torch.cat([part.rest for part in parts]).to(device),
        )

    def _example(self, number: int, count: int, seen: int) -> Largest:
        if not 0 <= number < self.index.examples:
            raise CalibrationError(f"example {number} is not in {self.folder}, which has {self.index.examples}")
        place = bisect.bisect_right([first for _, first in self.index.shards], number) - 1
        if place not in self._open:
            self._open[place] = safe_open(self.folder / self.index.shards[place][0], framework="pt")
        shard, inside = self._open[place], number - self.index.shards[place][1]
        start, stop = shard.get_slice("starts")[inside : inside + 2].tolist()
        if (stop - start, int(shard.get_slice("fingerprints")[inside : inside + 1])) != (count, seen):
            raise CalibrationError(
                f"example {number} of the training data is not the one whose predictions are in {self.folder}: it has "
                f"{count} predictions, there are {stop - start}, or its inputs differ; run cache_teacher() on the data "
                "as it is now, without augmentation and without masks that are drawn anew"
            )
        return Largest(*(shard.get_slice(name)[start:stop] for name in ("probabilities", "indices", "rest")))


def fingerprints(model: nn.Module, batch: Mapping[str, Any]) -> list[int]:
    """A number for each example's real input, whatever it was padded to."""
    name = next((n for n in (getattr(model, "main_input_name", "input_ids"), "input_ids") if n in batch), None)
    if name is None:
        name = next(key for key, value in batch.items() if isinstance(value, Tensor))
    values = batch[name].detach().cpu()
    mask = token_mask({k: v for k, v in batch.items() if not k.startswith("decoder_")}, values.shape[:2])
    rows = [row if mask is None else row[mask[i].cpu()] for i, row in enumerate(values)]
    return [_number(row.contiguous()) for row in rows]


def _number(row: Tensor) -> int:
    data = row.view(torch.uint8) if row.dim() else row
    digest = hashlib.blake2b(data.numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _check_cacheable(kind: Kind, rows: Counted, batch: Mapping[str, Any], k: int) -> None:
    if not rows.distribution or kind == "several":
        raise CalibrationError(
            "the teacher puts out no distribution over classes, of which the largest could be kept; use it in memory"
        )
    if "start_positions" in batch or "end_positions" in batch:
        raise CalibrationError(
            "question answering chooses between as many positions as its batch is long, so its predictions depend on "
            "the padding; use the teacher in memory"
        )
    if k > rows.values.shape[1]:
        raise CalibrationError(f"k is {k}, but the teacher chooses between {rows.values.shape[1]} classes; lower k")


class _Writer:
    """Gathers predictions, and writes a shard when there are enough."""

    def __init__(self, folder: Path, classes: int, k: int, temperature: float) -> None:
        self._folder, self._classes, self._k, self._temperature = folder, classes, k, temperature
        self._shards: list[tuple[str, int]] = []
        self._examples = 0
        self._clear()

    def _clear(self) -> None:
        self._parts: list[Largest] = []
        self._counts: list[int] = []
        self._prints: list[int] = []

    def add(self, rows: Counted, prints: Sequence[int]) -> None:
        narrow = torch.uint16 if self._classes <= _NARROW else torch.int32
        kept = largest(rows.values, self._k, self._temperature)
        part = Largest(kept.probabilities.half().cpu(), kept.indices.to(narrow).cpu(), kept.rest.cpu())
        self._parts.append(part)
        self._counts += rows.examples
        self._prints += prints
        if sum(self._counts) >= SHARD_ROWS:
            self._write()

    def _write(self) -> None:
        name = f"teacher-{len(self._shards) + 1:05d}.safetensors"
        tensors = {
            "probabilities": torch.cat([part.probabilities for part in self._parts]),
            "indices": torch.cat([part.indices for part in self._parts]),
            "rest": torch.cat([part.rest for part in self._parts]),
            "starts": torch.tensor([0, *self._counts]).cumsum(0),
            "fingerprints": torch.tensor(self._prints),
        }
        save_file(tensors, self._folder / name)
        self._shards.append((name, self._examples))
        self._examples += len(self._counts)
        self._clear()

    def finish(self, teacher: str) -> None:
        if self._counts:
            self._write()
        index = CacheIndex(teacher, self._classes, self._k, self._temperature, tuple(self._shards), self._examples)
        (self._folder / INDEX_NAME).write_text(json.dumps(asdict(index), indent=1) + "\n", encoding="utf-8")
