"""Values of a recipe that must be of a kind."""

from __future__ import annotations

from typing import Any

from hf_shrink.errors import RecipeError


def as_list(value: Any, where: str) -> tuple[Any, ...]:
    """A list's values. Raises RecipeError for anything else, a single name among it."""
    if not isinstance(value, list | tuple):
        raise RecipeError(f"{where} is a list, for example [{value}]")
    return tuple(value)


def check_switch(value: Any, where: str) -> None:
    """Raises RecipeError for anything but true and false."""
    if not isinstance(value, bool):
        raise RecipeError(f"{where} must be true or false, not {value!r}")
