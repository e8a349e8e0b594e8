"""What a training checkpoint holds of the parts, beside the Trainer's own files: hf_shrink_state.safetensors."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_shrink.errors import CheckpointError
from hf_shrink.training.schedule import Schedule, Window

STATE_NAME = "hf_shrink_state.safetensors"
FORMAT = "2"


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the Trainer saves at the present step."""
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says of the parts.

    Attributes:
        tensors: each part's, on the CPU.
        window: the one that the training began with.
        history: of what the training had logged, a digest.
        entries: how many these were; None: a checkpoint from before this was written down.
    """

    tensors: list[dict[str, Tensor]]
    window: Window
    history: str
    entries: int | None


def write_state(
    folder: Path, parts: Sequence[Mapping[str, Tensor]], recipe: Mapping[str, Any], schedule: Schedule, window: Window
) -> None:
    """Write the parts' tensors into a checkpoint that the Trainer has written, or the old file stays.

    Args:
        recipe, schedule: what they came from, checked when they are read.
        window: to go on with, however many steps there are to be then.
    """
    flat = {f"{i}.{name}": t.detach().cpu().clone() for i, part in enumerate(parts) for name, t in part.items()}
    flat = {name: tensor.contiguous() for name, tensor in flat.items()}
    logged = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)).log_history
    metadata = {
        "hf_shrink_format": FORMAT,
        "recipe": json.dumps(recipe, sort_keys=True),
        "schedule": json.dumps(asdict(schedule)),
        "window": json.dumps(asdict(window)),
        "history": _digest(logged),
        "entries": str(len(logged)),
    }
    new = folder / f".{STATE_NAME}.new"
    save_file(flat, new, metadata=metadata)
    os.replace(new, folder / STATE_NAME)


def read_state(folder: Path, recipe: Mapping[str, Any], schedule: Schedule, parts: int) -> Saved:
    """What `write_state` wrote for so many parts.

    Raises:
        CheckpointError: there is no such file, it is damaged, or of another recipe or schedule.
    """
    path = folder / STATE_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing, so masks and scores of the interrupted training are lost; resume from a checkpoint "
            f"that was saved with this callback, lying in the Trainer's output_dir"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; resume from another checkpoint") from error
    if metadata.get("hf_shrink_format") != FORMAT:
        raise CheckpointError(f"{path} is of another version of hf_shrink; resume with the version that wrote it")
    if metadata["recipe"] != json.dumps(recipe, sort_keys=True):
        raise CheckpointError(
            f"{folder} was trained with another recipe; resume with that one, or start anew in another output_dir"
        )
    began = Schedule(**json.loads(metadata["schedule"]))
    if began != schedule:
        raise CheckpointError(
            f"{folder} was trained with start={began.start}, end={began.end} and every={began.every}, not with "
            f"start={schedule.start}, end={schedule.end} and every={schedule.every}; give ShrinkCallback what "
            "it was trained with, or start anew in another output_dir"
        )
    found: list[dict[str, Tensor]] = [{} for _ in range(parts)]
    for name, tensor in flat.items():
        number, _, own = name.partition(".")
        found[int(number)][own] = tensor
    entries = int(metadata["entries"]) if "entries" in metadata else None
    return Saved(found, Window(**json.loads(metadata["window"])), metadata["history"], entries)


def check_same_training(folder: Path, saved: Saved, state: TrainerState) -> None:
    """Raises CheckpointError where the Trainer goes on from a checkpoint in another folder, as a digest of what was
    logged until then shows: it does not tell callbacks where that is. Callbacks in front may have logged more since."""
    if saved.history != _digest(state.log_history[: saved.entries]):
        raise CheckpointError(
            f"{folder} is of another training than the checkpoint that is resumed, and it is there that masks and "
            "scores are looked for; set output_dir to the folder that holds this checkpoint, or resume from one in "
            "output_dir"
        )


def _digest(logged: Sequence[Mapping[str, Any]]) -> str:
    """Of what was logged, the same before and after it was in trainer_state.json."""
    return hashlib.sha256(json.dumps(logged, sort_keys=True).encode()).hexdigest()
