"""Where a run works: beside its output, under a name that a second attempt finds again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from hf_shrink.checkpoint.folder import OutputFolder
from hf_shrink.checkpoint.journal import NAME, WRITTEN, Journal, write_again, written
from hf_shrink.checkpoint.record import RECORD_NAME
from hf_shrink.errors import CheckpointError, ShrinkError
from hf_shrink.sharding import ProcessLost, ranks

WORK = {"plan", "blocks"}  # what a journal holds that took work


class RunFolder:
    """A temporary sibling of the output folder, which appears, or is replaced, when everything is written.

    When the body raises, the sibling is removed, unless its journal says that something is finished: then it stays,
    and the next run with the same output goes on from there. Where something was asked for that cannot be (a
    `ShrinkError`), only a plan and blocks count, so that a run that is asked for otherwise does not find it. Of
    several processes the first one does all this.

    Attributes:
        folder: the sibling.
        output: becomes the output folder.
        scratch: for what is of no use to another process; each has its own, empty at the beginning.
        finished: for what the journal speaks of.
        whole: an earlier process had put the output into its place, and was cut off while it tidied up.

    Args:
        path, overwrite: as of `OutputFolder`.
        resume: go on from an earlier run; else what is left of it is deleted.
        source: the folder of a model that is read.

    Raises:
        CheckpointError: where the source lies in the output; on entry as `OutputFolder`, and while another process
            works on the same output.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        overwrite: bool = False,
        resume: bool = True,
        source: Path | None = None,
    ) -> None:
        self._target = OutputFolder(path, overwrite)
        if source is not None:
            self._target.check_apart(source)
        self._resume = resume
        place = self._target.path
        self.folder = place.parent / f".{place.name}.partial-run"
        self.output, self.scratch = self.folder / "output", self.folder / "scratch" / str(ranks().rank)
        self.finished = self.folder / "finished"
        self._lock = FileLock(place.parent / f".{place.name}.lock", blocking=False)
        self._journal: Journal | None = None
        self.whole = False

    def __enter__(self) -> RunFolder:
        self.whole = ranks().on_first(self._take)
        if not self.whole:
            self.scratch.mkdir(parents=True, exist_ok=True)
        return self

    def _take(self) -> bool:
        """Make the folder ready, for this run alone; whether the output was whole already."""
        left = self._resume and not self.output.exists() and written(self.folder)
        whole = left and (self._target.path / RECORD_NAME).is_file()
        if not whole:
            self._target.check()
        place = self._target.path
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout as error:
            raise CheckpointError(f"another process is writing {place}; wait for it, or give another folder") from error
        except OSError as error:
            raise CheckpointError(f"cannot write beside {place}: {error}; give another output folder") from error
        if whole:
            return True
        if not self._resume or not (self.folder / NAME).is_file():
            shutil.rmtree(self.folder, ignore_errors=True)
        write_again(self.folder)
        for old in (self.output, self.scratch.parent):
            shutil.rmtree(old, ignore_errors=True)
        for new in (self.output, self.finished):
            new.mkdir(parents=True, exist_ok=True)
        return False

    @property
    def target(self) -> Path:
        """The output folder in its place."""
        return self._target.path

    def journal(self, key: Mapping[str, Any]) -> Journal:
        """The run's journal. Raises CheckpointError where it is another run's, which then stays as it is."""
        self._journal = Journal.open(self.folder, key)
        return self._journal

    def _worth_keeping(self, kind: type[BaseException]) -> bool:
        if not (self.folder / NAME).is_file() or self._journal is None:
            return (self.folder / NAME).is_file()
        entries = self._journal.entries.keys()
        return bool(entries & WORK if issubclass(kind, ShrinkError) else entries)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._leave(kind)
            return
        try:
            ranks().wait()
        except ProcessLost:
            self._leave(ProcessLost)
            raise
        ranks().on_first(self._put)

    def _put(self) -> None:
        """Everything is written: the output goes to its place."""
        try:
            if not self.whole:
                if self._journal is not None:
                    self._journal.add(**{WRITTEN: True})
                self._target.put(self.output)
            shutil.rmtree(self.folder, ignore_errors=True)
        finally:
            self._unlock()

    def _leave(self, kind: type[BaseException]) -> None:
        """Something went wrong, in this process at least: the others may be gone."""
        if not ranks().first:
            return
        try:
            if not self._worth_keeping(kind):
                shutil.rmtree(self.folder, ignore_errors=True)
        finally:
            self._unlock()

    def _unlock(self) -> None:
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()
