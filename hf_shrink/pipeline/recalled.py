"""What passes have done, in a folder: lines for values and steps, and files for tensors, blocks and walks."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from hf_shrink.calibration.walk import StackWalk
from hf_shrink.calibration.walk_state import read_walk, write_walk
from hf_shrink.recall import Course, Done, Recall
from hf_shrink.residence import flush_folder, map_tensors, residence_of, rest, write_tensors, writing
from hf_shrink.sharding import ranks

T = TypeVar("T")
LOG = "recalled.jsonl"
EVERY = 15.0  # seconds of work between steps that may be lost; walks can take gigabytes to write


class Recalled(Recall):
    """Of several processes the first one writes; walks, which hold its own batches, each writes for itself.

    Args:
        folder: of one run, and of no other: nothing here is checked against what the run is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[str, Any] = ranks().on_first(self._read)

    def value(self, name: str, key: object, make: Callable[[], T]) -> T:
        entry = f"{name} {hashlib.sha256(repr(key).encode()).hexdigest()[:32]}"
        if entry not in self.known:
            self.add({entry: make()})
        found: T = self.known[entry]
        return found

    def course(self, name: str) -> Course:
        return _Course(self, name)

    def add(self, entries: Mapping[str, Any]) -> None:
        """Write entries down, all or none. When this returns, they are on the disk."""
        self.known |= ranks().on_first(lambda: self._append(entries))

    def _append(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        line = json.dumps(entries)
        path = self.folder / LOG
        new = not path.exists()
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        if new:
            flush_folder(self.folder)
        added: dict[str, Any] = json.loads(line)
        return added

    def _read(self) -> dict[str, Any]:
        path = self.folder / LOG
        known: dict[str, Any] = {}
        whole = 0  # bytes of lines that were written to their end
        for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
            if not line.endswith(b"\n"):
                break
            known |= json.loads(line)
            whole += len(line)
        if path.is_file() and path.stat().st_size > whole:
            os.truncate(path, whole)
        return known


@dataclass(frozen=True)
class _Step:
    """One that is done and not yet written down: its entry, what it said, and the blocks that it may have changed."""

    entry: str
    said: dict[str, Any]
    modules: Mapping[str, nn.Module]


class _Course(Course):
    """Steps are written down together with the walks behind them, as soon as EVERY seconds of work would be lost."""

    def __init__(self, recalled: Recalled, name: str) -> None:
        self._recalled, self._name = recalled, name
        self._stem = hashlib.sha256(name.encode()).hexdigest()[:12]
        self._number = 0
        self._last: dict[str, Any] | None = None  # the step before, where an earlier process did it
        self._waiting: list[_Step] = []
        self._since = time.monotonic()

    def step(
        self,
        do: Callable[[], Done],
        *,
        modules: Mapping[str, Any] | None = None,
        walks: Mapping[str, Any] | None = None,
    ) -> Done:
        entry = f"{self._name}: {self._number}"
        self._number += 1
        there = {name: walk for name, walk in (walks or {}).items() if walk is not None}
        known = self._recalled.known.get(entry)
        if known is not None:
            self._last = known
            for name, file in known["modules"].items():
                self._adopt(name, (modules or {})[name], file)
            return self._done(known)
        if self._last is not None:
            self._take_up(self._last, there)
            self._last = None
        done = do()
        tensors = f"{self._stem}-{self._number}.safetensors" if done.tensors else None
        if tensors is not None:
            ranks().on_first(lambda: write_tensors(self._recalled.folder / tensors, done.tensors))
        said = {"said": dict(done.said), "tensors": tensors}
        self._waiting.append(_Step(entry, said, modules or {}))
        if ranks().from_first(time.monotonic() - self._since >= EVERY):
            self._write(there)
        return self._done(said)

    def _write(self, walks: Mapping[str, StackWalk]) -> None:
        """All that waits, and where the walks are: the last step's entry, written last, is what is gone on from."""
        states: dict[str, dict[str, Any]] = {}
        for name, walk in walks.items():
            file = f"{self._stem}-{self._number}-{name}.safetensors"
            write_walk(walk, self._own(file))
            states[name] = {"file": file, "position": walk.position, "starved": walk.starved}
        entries: dict[str, Any] = {}
        for step in self._waiting:
            files = {}
            for place, (name, module) in enumerate(step.modules.items()):
                files[name] = f"{self._stem}-{self._number}-{len(entries)}-{place}.safetensors"
                self._finish(name, module, files[name])
            entries[step.entry] = {**step.said, "modules": files, "walks": states}
        ranks().wait()  # for everybody's walks
        self._recalled.add(entries)
        for path in self._recalled.folder.glob(self._own(f"{self._stem}-*-*.safetensors").name):
            if path not in [self._own(state["file"]) for state in states.values()]:
                path.unlink()
        self._waiting, self._since = [], time.monotonic()

    def _done(self, known: Mapping[str, Any]) -> Done:
        tensors = known["tensors"]
        return Done(known["said"], map_tensors(self._recalled.folder / tensors) if tensors else {})

    def _finish(self, name: str, block: nn.Module, file: str) -> None:
        residence, path = residence_of(block), self._recalled.folder / file
        assert residence is not None  # without one nothing is recalled
        ranks().on_first(lambda: residence.finish(name, block, path))
        if not ranks().first:
            residence.adopt(name, block, path)
        rest(block)

    def _adopt(self, name: str, block: nn.Module, file: str) -> None:
        residence = residence_of(block)
        assert residence is not None
        residence.adopt(name, block, self._recalled.folder / file)
        rest(block)

    def _take_up(self, known: Mapping[str, Any], walks: Mapping[str, StackWalk]) -> None:
        for name, walk in walks.items():
            state = known["walks"][name]
            read_walk(walk, self._own(state["file"]), state["position"], state["starved"])

    def _own(self, file: str) -> Path:
        """Where this process has what each has for itself."""
        return self._recalled.folder / f"{ranks().rank}-{file}"
