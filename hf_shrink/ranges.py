"""Ascending whole numbers as text: 0, 1, 2 and 5 are "0-2,5"."""

from __future__ import annotations

from collections.abc import Iterable

from hf_shrink.errors import RecipeError
from hf_shrink.values import is_whole


def are_numbers(values: Iterable[object]) -> bool:
    """Whether all of them are whole numbers."""
    return all(map(is_whole, values))


def to_ranges(numbers: Iterable[int], separator: str = ",") -> str:
    """Ascending numbers from 0 on, as text; no numbers are ""."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return separator.join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def from_ranges(text: str) -> tuple[int, ...]:
    """What `to_ranges` was given. Raises RecipeError unless `text` says ascending numbers, each once."""
    try:
        parts = [tuple(map(int, part.split("-"))) for part in text.split(",")] if text else []
    except ValueError as error:
        raise RecipeError(f"{text[:60]!r} are not numbers and ranges such as '0-2,5'") from error
    last = -1
    for part in parts:
        if len(part) > 2 or not last < part[0] <= part[-1]:
            raise RecipeError(f"{text[:60]!r} are not ascending numbers, each once, such as '0-2,5'")
        last = part[-1]
    return tuple(i for part in parts for i in range(part[0], part[-1] + 1))
