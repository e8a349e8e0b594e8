"""What a caller of `evaluate_model` asks for in place of the usual."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_shrink.errors import CalibrationError, RecipeError
from hf_shrink.recipe import EvaluationSpec
from hf_shrink.registry import did_you_mean

CHANGED = ("samples", "length", "batch_size", "stride")  # what may be given alone


def given(spec: EvaluationSpec | Mapping[str, Any] | None) -> dict[str, Any]:
    """What is asked for, of what rows have as well, and the stride. Raises RecipeError for other names."""
    if isinstance(spec, EvaluationSpec):
        return {name: getattr(spec, name) for name in CHANGED}
    for name in spec or {}:
        if name not in CHANGED:
            raise RecipeError(f"unknown key {name!r} in spec; {did_you_mean(str(name), CHANGED)}")
    return dict(spec or {})


def given_of_rows(spec: EvaluationSpec | Mapping[str, Any] | None, said: str) -> dict[str, Any]:
    """The same of rows, which have no stride."""
    found = given(spec)
    if found.pop("stride", None) is not None:
        raise CalibrationError(
            f"a stride is between windows of text, and {said} is rows with answers; leave it out, or the recipe that "
            "has it"
        )
    return found
