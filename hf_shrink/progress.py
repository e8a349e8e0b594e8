"""How work says how far it is: a callable of (what, done, total), and where wanted a note that changes on the way."""

from __future__ import annotations

from typing import Protocol


class ProgressCallback(Protocol):
    """`done` of `total` parts of `what` are finished; `note`: what has come of them so far."""

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None: ...


def working_on(progress: ProgressCallback, what: str, rows: int = 0) -> None:
    """Say what of the current part is in work, and how many rows of matrices that will be, to whoever shows it."""
    show = getattr(progress, "working_on", None)
    if show is not None:
        show(what, rows)


def quiet(what: str, done: int, total: int, note: str = "") -> None:
    """Says nothing."""
