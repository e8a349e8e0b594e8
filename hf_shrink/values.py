"""Values of a recipe or plan that must be of a kind."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hf_shrink.errors import RecipeError
from hf_shrink.registry import did_you_mean


def as_list(value: Any, where: str) -> tuple[Any, ...]:
    """A list's values. Raises RecipeError for anything else, a single name among it."""
    if not isinstance(value, list | tuple):
        raise RecipeError(f"{where} is a list, for example [{value}]")
    return tuple(value)


def check_switch(value: Any, where: str) -> None:
    """Raises RecipeError for anything but true and false."""
    if not isinstance(value, bool):
        raise RecipeError(f"{where} must be true or false, not {value!r}")


def check_one_of(value: Any, valid: Iterable[str], where: str) -> None:
    """Raises RecipeError for anything but one of these words, naming the nearest."""
    known = tuple(valid)
    if value not in known:
        raise RecipeError(f"unknown {where} {value!r}; {did_you_mean(str(value), known)}")


def is_whole(value: object) -> bool:
    """Whether it is a whole number; true and false, and 4.0, are none."""
    return isinstance(value, int) and not isinstance(value, bool)
