"""Quantize steps that store weights in another library's format, which has no grid to choose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_shrink.errors import RecipeError
from hf_shrink.plan import FORMATS
from hf_shrink.registry import did_you_mean

FORMAT_METHOD = "bitsandbytes"
# What such a step has no use for.
GRID_KEYS = ("symmetric", "strategy", "group_size")
IDLE = {"symmetric_inputs": False, "starved_experts": "error"}  # as they stand in recipes that are written out
NOT_TAKEN = (*GRID_KEYS, *IDLE, "overrides", "head", "transforms", "tune")


def format_of(scheme: Any) -> str | None:
    """The format that a scheme's name means, in any case; None for other schemes."""
    return next((name for name in FORMATS if name.lower() == str(scheme).lower()), None)


def check_formats(step: Mapping[str, Any]) -> None:
    """Refuse a quantize step in which method and scheme do not go together, or keys that the format decides.

    Args:
        step: the keys that were given, at least method and scheme where they were.

    Raises:
        RecipeError: it says what to write instead.
    """
    method, scheme = step.get("method"), step.get("scheme")
    overrides = step.get("overrides") or {}
    if not isinstance(overrides, Mapping):
        raise RecipeError(f"quantize.overrides is a mapping of modules to keys, not {overrides!r}")
    schemes = [scheme, *(o.get("scheme") for o in overrides.values() if isinstance(o, Mapping))]
    if method != FORMAT_METHOD:
        for name in filter(None, map(format_of, schemes)):
            raise RecipeError(
                f"{name} is a scheme of method {FORMAT_METHOD}, for all weights or none: write "
                f"quantize: {{method: {FORMAT_METHOD}, scheme: {name}}}"
            )
        return
    if format_of(scheme) is None:
        raise RecipeError(
            f"method {FORMAT_METHOD} needs one of its own schemes, not {scheme!r}; {did_you_mean(str(scheme), FORMATS)}"
        )
    for key in NOT_TAKEN:
        if key in step and step[key] not in ({}, (), [], None, IDLE.get(key)):
            raise RecipeError(
                f"quantize.{key} does not go with method {FORMAT_METHOD}: {format_of(scheme)} decides how weights are "
                "stored, alike for all of them; leave the key out (the recipes nf4 and llm-int8 show the form)"
            )
