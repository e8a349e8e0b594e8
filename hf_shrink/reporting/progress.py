"""Progress on stderr, and quiet libraries underneath."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, TextIO

from tqdm import tqdm

from hf_shrink.residence import peak_memory
from hf_shrink.sharding import ranks

# Seconds between two lines of one task where there is no terminal to redraw a bar on.
LINE_EVERY = 15.0


class Progress:
    """Callable `(what, done, total, note)`: a bar on a terminal, now and then a line in a log, nothing when quiet.

    Of several processes only the first says anything.

    A task begins when `what` changes and ends when `done` reaches `total`. Use it as a context manager, or `close()`
    it, so that an interrupted bar leaves the terminal in order.

    Args:
        quiet: say nothing.
        file: in place of stderr.
    """

    def __init__(self, quiet: bool = False, file: TextIO | None = None) -> None:
        quiet = quiet or not ranks().first
        self._file = file if file is not None else sys.stderr
        self._working_on, self._rows, self._first = "", 0, 0
        self._bars = not quiet and self._file.isatty()
        self._lines = not quiet and not self._bars
        self._bar: Any = None
        self._what: str | None = None
        self._started = self._printed = 0.0

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None:
        """Say that `done` of `total` parts of `what` are finished, and in `note` what has come of them so far."""
        if what != self._what:
            self.close()
            self._what, self._started, self._printed = what, time.monotonic(), time.monotonic()
            self._working_on, self._rows, self._first = "", 0, done
        if self._bars:
            self._draw(what, done, total, note)
        elif self._lines:
            self._print(what, done, total, note)
        if done >= total:
            self.close()

    def working_on(self, what: str, rows: int = 0) -> None:
        """Say what of the current part is in work, and how many rows of matrices that will be."""
        self._working_on = what
        self._rows += rows
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(self._details(time.monotonic() - self._started)))

    def _details(self, gone: float) -> list[str]:
        """What is in work, how fast, and the most memory so far; nothing for tasks that do not say."""
        if not self._working_on:
            return []
        return [
            self._working_on,
            f"{self._rows / max(gone, 1e-9):.0f} rows/s",
            f"peak {peak_memory() / 1e9:.1f} GB",
        ]

    def say(self, line: str) -> None:
        """A line that stays."""
        if self._bars or self._lines:
            self.close()
            print(line, file=self._file, flush=True)

    def close(self) -> None:
        """End the current task."""
        if self._bar is not None:
            self._bar.close()
        self._bar, self._what = None, None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _draw(self, what: str, done: int, total: int, note: str) -> None:
        if self._bar is None:
            self._bar = tqdm(total=total, desc=what, file=self._file, dynamic_ncols=True, leave=True)
        self._bar.total = total
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done - self._bar.n)

    def _print(self, what: str, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        if done >= total or now - self._printed >= LINE_EVERY:
            self._printed = now
            gone = now - self._started
            since = done - self._first if self._first < done else done  # a run may go on in the middle
            left = gone / since * (total - done) if since else 0.0
            rest = [f"about {left / 60:.0f} min left"] if left >= 60 else []
            words = ", ".join([f"{gone:.0f} s", *rest, *self._details(gone)])
            said = f", {note}" if note else ""
            print(f"{what}: {done}/{total} ({words}){said}", file=self._file, flush=True)


@contextmanager
def showing(progress: bool | str | os.PathLike[str]) -> Iterator[Progress]:
    """Progress on stderr, none (False), or lines appended to a file."""
    with ExitStack() as stack:
        named = not isinstance(progress, bool)
        file = stack.enter_context(open(progress, "a", encoding="utf-8")) if named else None
        yield stack.enter_context(Progress(quiet=progress is False, file=file))


@contextmanager
def silence(enabled: bool = True) -> Iterator[None]:
    """No progress bars and no warnings of transformers, huggingface_hub and datasets inside; all restored after."""
    if not enabled:
        yield
        return
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    level, bars, hub_bars = logging.get_verbosity(), logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    with warnings.catch_warnings(), silence_datasets() if "datasets" in sys.modules else nullcontext():
        warnings.simplefilter("ignore")
        logging.set_verbosity(logging.log_levels["error"])
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()
            # transformers switches the Hub's bars along with its own, so these come last.
            (enable_progress_bars if hub_bars else disable_progress_bars)()


@contextmanager
def silence_datasets() -> Iterator[None]:
    """The same for datasets alone. It takes a second and 90 MB to import, so only what uses it anyway calls this."""
    import datasets

    level, bars = datasets.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()
