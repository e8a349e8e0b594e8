"""Effort levels: how much work quantization may be, for users who do not know the methods by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from hf_shrink.errors import RecipeError
from hf_shrink.registry import did_you_mean

EFFORTS: Mapping[str, Mapping[str, Any]] = {
    "fast": {"method": "rtn"},  # no data; its search beats hqq on SmolLM2 (see quantization/rtn.py)
    "balanced": {"method": "gptq"},
    "best": {"method": "gptq", "tune": {"steps": 128}},
}
CHOICES = ("method", "transforms", "tune")  # what an effort stands for; where it names none, there is none


def expand(step: Mapping[str, Any]) -> dict[str, Any]:
    """A quantize step with its `effort` written out; as it is where it has none.

    Raises:
        RecipeError: an unknown effort, or one beside what it stands for.
    """
    effort = step.get("effort")
    if effort is None:
        return dict(step)
    if not isinstance(effort, str) or effort not in EFFORTS:
        raise RecipeError(f"unknown effort {effort!r}; {did_you_mean(str(effort), EFFORTS)}")
    chosen = _for_scheme(EFFORTS[effort], str(step.get("scheme")).upper())
    for key in CHOICES:
        if key in step and (step[key] or None) != chosen.get(key):
            raise RecipeError(
                f"effort: {effort} stands for {{{written_out(chosen)}}} and decides {key}; give either effort or {key}"
            )
    return {**chosen, **step}


def collapse(step: dict[str, Any]) -> None:
    """The inverse of `expand`, in place: before a step's scheme changes, what its effort chose for that goes."""
    effort = step.get("effort")
    if isinstance(effort, str) and effort in EFFORTS:
        for key, value in _for_scheme(EFFORTS[effort], str(step.get("scheme")).upper()).items():
            if step.get(key) == value:
                del step[key]


def _for_scheme(effort: Mapping[str, Any], scheme: str) -> dict[str, Any]:
    """An effort with what pays under one scheme only."""
    chosen = dict(effort)
    if scheme == "W8A8" and chosen["method"] == "gptq":
        chosen["transforms"] = ["shift"]
    return chosen


def written_out(chosen: Mapping[str, Any]) -> str:
    """What an effort stands for, as it would be written in a recipe: "method: gptq, tune: {steps: 100}"."""
    flow = yaml.safe_dump(dict(chosen), default_flow_style=True, sort_keys=False, width=float("inf"))
    return flow.strip().removeprefix("{").removesuffix("}")
