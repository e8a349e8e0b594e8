"""The output folder: whole or not there at all."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

from transformers.utils import CONFIG_NAME

from hf_shrink.checkpoint.record import RECORD_NAME
from hf_shrink.errors import CheckpointError


class OutputFolder:
    """Write into a temporary sibling; the target appears, or is replaced, when everything is written.

        with OutputFolder("out") as folder:
            model.save_pretrained(folder)

    When the body raises, the sibling is removed and the target is as it was.

    Args:
        path: the target. Its parents are made.
        overwrite: replace a model that is there already.

    Raises:
        CheckpointError: on entry, when the target cannot be written, is a file or a mount point, or is not empty
            and may not be replaced; on exit, when it appeared meanwhile.
    """

    def __init__(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        self.path = Path(os.path.realpath(Path(path).expanduser()))
        self._overwrite = overwrite
        self._partial: Path | None = None

    def check_apart(self, source: Path) -> None:
        """Raises CheckpointError where putting the target into its place would remove a model that is read."""
        own = Path(os.path.realpath(source))
        if own == self.path or self.path in own.parents:
            raise CheckpointError(f"{source} would be overwritten by its own result; give another output folder")

    def check(self) -> None:
        """Raises CheckpointError when the target may not be written, before anything is."""
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(f"{self.path} is a file; give a folder that does not exist yet")
        if self.path.is_mount():
            raise CheckpointError(
                f"{self.path} is a mount point, so that no finished folder can be put into its place; give a folder "
                f"inside it: {self.path / 'model'}"
            )
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return
        if not self._overwrite:
            raise CheckpointError(f"{self.path} is not empty; give another folder, or --overwrite (overwrite=True)")
        if not any((self.path / name).is_file() for name in (CONFIG_NAME, RECORD_NAME)):
            raise CheckpointError(f"{self.path} holds something that is not a model; it is not overwritten: empty it")

    def put(self, partial: Path) -> None:
        """Let a finished folder beside the target take its place. Raises CheckpointError when it appeared meanwhile."""
        partial.chmod(0o777 & ~_umask())
        _flush(partial)
        self.check()
        _put(partial, self.path)

    def __enter__(self) -> Path:
        self.check()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = tempfile.mkdtemp(prefix=f".{self.path.name}.partial-", dir=self.path.parent)
        except OSError as error:
            raise CheckpointError(f"cannot write beside {self.path}: {error}; give another output folder") from error
        self._partial = Path(partial)
        return self._partial

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._partial is not None
        try:
            if kind is None:
                self.put(self._partial)
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(folder: Path) -> None:
    """All files of a folder, and the folders' own entries, onto the disk."""
    for root, _, names in os.walk(folder):
        for name in [*names, "."]:
            descriptor = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _put(partial: Path, target: Path) -> None:
    """Rename into place; what was there is moved aside first and removed last."""
    if not target.is_dir() or not any(target.iterdir()):
        os.replace(partial, target)
    else:
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.replaced-", dir=target.parent))
        os.replace(target, aside)
        try:
            os.replace(partial, target)
        except OSError:
            os.replace(aside, target)
            raise
    for old in target.parent.glob(f".{glob.escape(target.name)}.replaced-*"):  # of processes that were cut off here too
        shutil.rmtree(old)
