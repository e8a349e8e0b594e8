"""What a run has finished, on the disk, so that one that was cut off goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_shrink.errors import CheckpointError
from hf_shrink.residence import flush_folder, writing
from hf_shrink.sharding import ranks

NAME = "journal.json"
FORMAT = 1
WRITTEN = "written"  # the entry that is made when all that is left is to rename the output


@dataclass
class Journal:
    """A JSON file that is replaced as a whole whenever something more is finished.

    Of several processes the first one writes it; the entries are the same in all.

    Attributes:
        path: of the file.
        key: what decides a run's result: source, recipe, seed, versions.
        entries: what is finished, by name; JSON values.
    """

    path: Path
    key: dict[str, Any]
    entries: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, key: Mapping[str, Any]) -> Journal:
        """The journal in `folder`, or a new one.

        Raises:
            CheckpointError: there is one of another run; says what is different.
        """
        return ranks().on_first(lambda: cls._read(folder, key))

    @classmethod
    def _read(cls, folder: Path, key: Mapping[str, Any]) -> Journal:
        path, now = folder / NAME, dict(json.loads(json.dumps(key)))
        if not path.is_file():
            return cls(path, now)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            known, entries = dict(data["key"]), dict(data["entries"])
            changed = [] if data["format"] == FORMAT else ["hf_shrink itself"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is not a journal ({error}); start anew with --no-resume (resume=False)"
            ) from error
        changed += differences(known, now)
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise CheckpointError(
                f"the run that was interrupted in {folder} was another one: {'; '.join(changed[:3])}{more}. Run it as "
                "it was to go on, or start anew with --no-resume (resume=False), which deletes what it has finished"
            )
        return cls(path, now, entries)

    def get(self, name: str) -> Any:
        """An entry, or None."""
        return self.entries.get(name)

    def add(self, **entries: Any) -> None:
        """Write down that more is finished in all processes. When this returns, it is on the disk."""
        self.entries.update(ranks().on_first(lambda: self._added(entries)))

    def _added(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        added: dict[str, Any] = json.loads(json.dumps(entries))
        self.entries.update(added)
        _write(self.path, {"format": FORMAT, "key": self.key, "entries": self.entries})
        return added


def _write(path: Path, data: Mapping[str, Any]) -> None:
    partial = path.with_name(f"{NAME}.partial")
    with writing(partial), partial.open("w", encoding="utf-8") as file:
        json.dump(data, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    flush_folder(path.parent)


def written(folder: Path) -> bool:
    """Whether a journal in `folder` says that the output was whole."""
    try:
        return bool(json.loads((folder / NAME).read_text(encoding="utf-8"))["entries"].get(WRITTEN))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_again(folder: Path) -> None:
    """Take back that the output was whole: it is made anew, and until then it is not."""
    if written(folder):
        data = json.loads((folder / NAME).read_text(encoding="utf-8"))
        data["entries"].pop(WRITTEN)
        _write(folder / NAME, data)


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """In words, what is not the same in two JSON values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = dict.fromkeys([*old, *new])
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            line
            for place, pair in enumerate(zip(old, new, strict=True))
            for line in differences(*pair, f"{name}.{place}")
        ]
    return [] if old == new else [f"{name} was {_short(old)}, is {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
