"""Strings that name something, and strings that are text themselves."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from hf_shrink.errors import RecipeError, ShrinkError

SHOWN = 40  # characters of a text in a message


def is_name(said: str | os.PathLike[str]) -> bool:
    """Whether it can be a name or a path, there or not: one line, of a length that files can have."""
    text = os.fspath(said)
    try:
        os.stat(text)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
    except ValueError:  # NUL, or what no file system can spell
        return False
    return "\n" not in text


def check_name(said: str | os.PathLike[str], instead: str, error: type[ShrinkError] = RecipeError) -> None:
    """Raises `error` where it is text itself; `instead`: what to do then."""
    if not is_name(said):
        raise error(f"{os.fspath(said)[:SHOWN]!r}... looks like text, not like a name or a path; {instead}")


def json_text(source: str | os.PathLike[str], what: str) -> str:
    """JSON text as it is, or what the file at a path holds. Raises RecipeError where there is neither."""
    if isinstance(source, str) and source.lstrip()[:1] in ("{", "["):
        return source
    check_name(source, f"pass the path of a {what}, or the JSON text of one, which starts with {{")
    try:
        return Path(source).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read {what} {os.fspath(source)}: {error}") from error
