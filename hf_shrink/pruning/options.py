"""Checks of options that several methods have."""

from __future__ import annotations

from typing import Any


def check_counts(method: Any, *names: str, optional: tuple[str, ...] = (), least: int = 1) -> None:
    """Raises ValueError unless the fields are whole numbers of at least `least` (or None, where `optional`)."""
    for name in names:
        value = getattr(method, name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (value is None and name in optional) and (not whole or value < least):
            raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
