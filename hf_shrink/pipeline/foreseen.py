"""What a recipe says of its plan before there is one: enough to see that a disk is too small for any."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from hf_shrink.pipeline.planning import experts_apart
from hf_shrink.pipeline.targets import asked_schemes, select
from hf_shrink.plan import Plan
from hf_shrink.recipe import Recipe


def foreseen(model: nn.Module, asked: Recipe | Plan) -> Plan | None:
    """A plan with only the weights that may be quantized, their bits, and the dtype of the others.

    `estimate` finds no more for it than for the plan that comes, which quantizes no others.

    Returns:
        A plan as it is; None where a search for a budget decides.

    Raises:
        RecipeError: as of `select`.
    """
    if isinstance(asked, Plan):
        return asked
    if asked.budget is not None:
        return None
    plan, step = Plan(model_type=type(model).__name__, refit=False, dtype=asked.dtype), asked.quantize
    if step is None:
        return plan
    plan = replace(plan, method=step.method, options=dict(step.options))
    with experts_apart(model) as binding:
        selected = select(model, binding, step)
        if step.format is not None:
            return replace(plan, formats=dict.fromkeys(selected.paths, step.format))
        return replace(plan, schemes=asked_schemes(model, step, selected))
