"""What stands in a row's cells, as what tasks read: texts, right answers, numbers, places of classes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from numbers import Number
from typing import Any

from hf_shrink.errors import CalibrationError

# What pandas writes for a list, or a broken one: quotes behind the bracket, as no sentence begins.
_LIKE_A_LIST = re.compile(r"""\s*(\[\s*['"].*\]|\{\s*['"]text['"]\s*:.*\})\s*""", re.DOTALL)
_SHOWN = 60


class Place(int):
    """A class by its place among the names that a data set gives its own, which is no name that a model may know."""


def shown(row: Mapping[str, Any]) -> str:
    """A row in few words, so that a message says which one it is about."""
    return ", ".join(f"{name}: {_short(value)}" for name, value in row.items())


def text_of(row: Mapping[str, Any], role: str) -> str:
    """The text of a role; a number as it is written.

    Raises CalibrationError for anything else, of which `str` would make a text that nobody wrote.
    """
    value = row.get(role)
    if not isinstance(value, str | Number):
        raise CalibrationError(f"{role} must be a text, not {_short(value)}, in the row with {shown(row)}")
    return str(value)


def texts_of(row: Mapping[str, Any], role: str) -> list[str]:
    """The texts of a role: those of a list or of SQuAD's {text, answer_start}, or the one text.

    Raises CalibrationError as `text_of`, for each of them.
    """
    value = row.get(role)
    if isinstance(value, Mapping):
        value = value.get("text", value)
    if not isinstance(value, Iterable) or isinstance(value, str | Mapping):
        value = [value]
    return [text_of({**row, role: one}, role) for one in value]


def number_of(row: Mapping[str, Any], role: str) -> float:
    """The number of a role. Raises CalibrationError for what is none, or is not finite."""
    value: Any = row.get(role)
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise CalibrationError(f"{role} must be a number, not {_short(value)}, in the row with {shown(row)}")
    return found


def listed(value: Any, role: str) -> Any:
    """A list as it is, or one that a text holds as JSON. Raises CalibrationError for any other text."""
    if not isinstance(value, str):
        return value
    found = _decoded(value)
    if not isinstance(found, list | dict):
        raise CalibrationError(
            f'{role} must be a list, not the text {value[:60]!r}; write it as JSON, such as ["one", "two"]'
        )
    return found


def cell_of(value: str, role: str) -> Any:
    """A cell of a CSV file where a list may stand: a list or SQuAD's {text, answer_start} as JSON, else its text.

    Raises CalibrationError for what looks like a list of texts and is no JSON.
    """
    found = _decoded(value)
    if isinstance(found, list) or (isinstance(found, dict) and {"text"} <= set(found) <= {"text", "answer_start"}):
        return found
    if found is None and _LIKE_A_LIST.fullmatch(value):
        raise CalibrationError(
            f'{role} looks like a list and is not JSON: {value[:60]!r}; write ["one", "two"], and a text that begins '
            "like a list as a list of that one"
        )
    return value


def _decoded(text: str) -> Any:
    """What a text holds as JSON; None where it holds none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def _short(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= _SHOWN else f"{said[:_SHOWN]}..."
