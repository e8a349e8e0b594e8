"""How a result came about and how to get it again: recipe, command, versions, machine. No path of this machine."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hf_shrink.reporting.figures import Record


def is_hub_id(source: str) -> bool:
    """Whether a source is named as on the Hub, `owner/name`, and is no folder here."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None and source[0] != "." and not Path(source).exists()


def shown_source(record: Record) -> str:
    """The source as others may see it: of a folder only the name, its path is nobody else's business."""
    return record.source if is_hub_id(record.source) else _last(record.source)


def shown_recipe(record: Record) -> str:
    """The recipe as YAML, files by their names; empty where a plan was given instead."""
    if not record.recipe:
        return ""
    return yaml.safe_dump(without_folders(dict(record.recipe)), sort_keys=False, default_flow_style=None).rstrip()


def command(record: Record) -> str:
    """What does the same again, on `shrink.json` from beside the report; empty where training had a part in it."""
    if record.report.trained:
        return ""
    seed = f" --seed {record.report.seed}" if record.report.seed else ""
    return f"hf-shrink run {shlex.quote(shown_source(record))} --recipe shrink.json{seed} --output again"


TRAINED = "It was made while it was trained: it takes that training again, with ShrinkCallback and this recipe."


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
