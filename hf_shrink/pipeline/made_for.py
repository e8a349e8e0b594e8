"""Whether a plan was made for the model that it is to be carried out on: seen before anything is computed."""

from __future__ import annotations

from torch import nn

from hf_shrink.errors import ArchitectureError
from hf_shrink.pipeline.planning import experts_apart, find_binding
from hf_shrink.plan import Plan
from hf_shrink.surgery import check_plan

ANEW = "make the plan anew for this model, with `hf-shrink plan` or make_plan()"


def check_made_for(model: nn.Module, plan: Plan) -> None:
    """Raises ArchitectureError when the plan was made for another model. The model stays as it is."""
    binding = find_binding(model)
    own = type(model).__name__ if binding is None else binding.model_type
    if plan.model_type != own:
        raise ArchitectureError(f"the plan was made for a {plan.model_type!r} model, and this one is {own!r}; {ANEW}")
    depths = {} if binding is None else binding.depths
    for name in plan.depths.keys() | depths.keys() if plan.depths else ():
        theirs, ours = plan.depths.get(name, 0), depths.get(name, 0)
        if theirs != ours:
            raise ArchitectureError(
                f"the plan was made for a model with {theirs} blocks in {name}, and this one has {ours}; {ANEW}"
            )
    if binding is not None:
        check_plan(binding, plan)
    named = [*plan.bits, *(plan.weights.modules if plan.weights is not None else ())]
    if _missing(model, named):
        # A plan names experts one by one.
        with experts_apart(model):
            missing = _missing(model, named)
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ArchitectureError(f"the plan names {missing[0]}{more}, which this model does not have; {ANEW}")


def _missing(model: nn.Module, paths: list[str]) -> list[str]:
    known = {path for path, _ in model.named_modules(remove_duplicate=False)}
    return [path for path in dict.fromkeys(paths) if path not in known]
