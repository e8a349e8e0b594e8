"""How a result came about and how to get it again: recipe, command, versions, machine. No path of this machine."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from hf_shrink.reporting.figures import Record


def is_hub_id(source: str) -> bool:
    """Whether a record's source is a name on the Hub, `owner/name`, or `name` alone as the oldest models there have it;
    no folder is, see `checkpoint.record`."""
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return True


def shown_source(record: Record) -> str:
    """The source as others may see it: of a folder only the name, its path is nobody else's business."""
    return record.source if is_hub_id(record.source) else _last(record.source)


def shown_recipe(record: Record) -> str:
    """The recipe as YAML, files by their names; empty where a plan was given instead."""
    if not record.recipe:
        return ""
    return yaml.safe_dump(without_folders(dict(record.recipe)), sort_keys=False, default_flow_style=None).rstrip()


TRAINED = "It was made while it was trained: it takes that training again, with ShrinkCallback and this recipe."
# What `hf-shrink recover` takes of the options of a recovery.
RECOVERY = ("method", "minutes", "steps", "samples", "length", "rank", "learning_rate", "task")


def command(record: Record) -> str:
    """What does the same again, on `shrink.json` from beside the report; empty where no command does, see
    `no_command`."""
    if no_command(record):
        return ""
    report, source = record.report, shlex.quote(shown_source(record))
    run = f"hf-shrink run {source} --recipe shrink.json{_seed(report.seed)} --output again"
    recover = f"hf-shrink recover again --baseline {source} --output again --overwrite"
    return "\n".join([run, *(f"{recover} {_recovery(given)}" for given in report.recoveries)])


def no_command(record: Record) -> str:
    """Why no command does the same again; empty where one does."""
    report = record.report
    if report.trained:
        return TRAINED
    if report.calibration.get("object"):
        said = report.calibration.get("description", "data")
        return f"It was calibrated on {said}, handed over in Python: the same again takes `shrink` with that data."
    if any(given["data"] is None for given in report.recoveries):
        return "It was recovered on data that was handed over in Python: the same again takes `recover` with that data."
    others = [name for given in report.recoveries for name in given if name not in (*RECOVERY, "data", "seed")]
    if others:
        return f"It was recovered with {', '.join(others)}, which only `recover_checkpoint` in Python takes."
    return ""


def _seed(seed: int) -> str:
    return f" --seed {seed}" if seed else ""


def _recovery(given: Mapping[str, Any]) -> str:
    """The options of `hf-shrink recover`."""
    words = [f"--data {shlex.quote(without_folders(given['data']))}"]
    words += [f"--{name.replace('_', '-')} {given[name]}" for name in RECOVERY if given.get(name) is not None]
    return f"{' '.join(words)}{_seed(given['seed'])}"


def provenance(record: Record) -> dict[str, str]:
    """What the result depends on besides, by name."""
    report, found = record.report, {"Dense model": shown_source(record)}
    calibration = report.calibration.get("description")
    if calibration:
        found["Calibration"] = str(calibration)
    found["Seed"] = str(report.seed)
    machine = report.machine
    if machine:
        said = [str(machine[key]) for key in ("device", "processor") if machine.get(key)]
        count = machine.get("threads")
        said += [f"{count} thread{'s' * (count != 1)}"] if count else []
        said += [f"{machine['memory_gb']:g} GB of memory"] if machine.get("memory_gb") else []
        found["Machine"] = ", ".join(said)
    if record.versions:
        found["Versions"] = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    return found


def seconds(amount: float) -> str:
    """A time for people."""
    if amount < 100:
        return f"{amount:.3g} s"
    minutes, rest = divmod(round(amount), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def without_folders(value: Any) -> Any:
    """Decoded YAML or JSON in which files of this machine have their names only."""
    if isinstance(value, Mapping):
        return {key: without_folders(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(entry) for entry in value]
    return _last(value) if isinstance(value, str) and Path(value).is_absolute() else value


def _last(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "model"
