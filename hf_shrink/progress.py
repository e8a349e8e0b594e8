"""How work says how far it is: a callable of (what, done, total)."""

from __future__ import annotations

from collections.abc import Callable

ProgressCallback = Callable[[str, int, int], None]


def quiet(what: str, done: int, total: int) -> None:
    """Says nothing."""
