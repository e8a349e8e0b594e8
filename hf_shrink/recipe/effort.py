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
    "best": {"method": "gptq", "tune": {"steps": 128, "own_text": 0.5}},
}
ROUNDS_INPUTS = ("W8A8",)  # schemes for which shift is part of an effort that takes data
CHOICES = ("method", "transforms", "tune")  # what an effort stands for; where it names none, there is none


def expand(step: Mapping[str, Any]) -> dict[str, Any]:
    """A quantize step with its `effort` written out; as it is where it has none.

    Raises:
        RecipeError: an unknown effort, or one beside what it stands for.
    """
    effort = step.get("effort")
    if effort is None:
        return dict(step)
    if effort not in EFFORTS:
        raise RecipeError(f"unknown effort {effort!r}; {did_you_mean(str(effort), EFFORTS)}")
    chosen = dict(EFFORTS[effort])
    if effort != "fast" and str(step.get("scheme")).upper() in ROUNDS_INPUTS:
        chosen["transforms"] = ["shift"]
    for key in CHOICES:
        if key in step and (step[key] or None) != chosen.get(key):
            raise RecipeError(
                f"effort: {effort} stands for {{{written_out(chosen)}}} and decides {key}; give either effort or {key}"
            )
    return {**chosen, **step}


def written_out(chosen: Mapping[str, Any]) -> str:
    """What an effort stands for, as it would be written in a recipe: "method: gptq, tune: {steps: 100}"."""
    flow = yaml.safe_dump(dict(chosen), default_flow_style=True, sort_keys=False, width=float("inf"))
    return flow.strip().removeprefix("{").removesuffix("}")
