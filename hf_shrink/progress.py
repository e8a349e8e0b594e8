"""How work says how far it is: a callable of (what, done, total)."""

from __future__ import annotations

from collections.abc import Callable

ProgressCallback = Callable[[str, int, int], None]


def working_on(progress: ProgressCallback, what: str, rows: int = 0) -> None:
    """Say what of the current part is in work, and how many rows of matrices that will be, to whoever shows it."""
    show = getattr(progress, "working_on", None)
    if show is not None:
        show(what, rows)


def quiet(what: str, done: int, total: int) -> None:
    """Says nothing."""
