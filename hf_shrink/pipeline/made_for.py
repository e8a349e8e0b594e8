"""A plan and the model that it is to be carried out on: seen to fit each other before anything is computed."""

from __future__ import annotations

from torch import nn

from hf_shrink.errors import ArchitectureError
from hf_shrink.pipeline.leaves import without_removed
from hf_shrink.pipeline.planning import Planned, experts_apart, find_binding
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
    named = _named(plan)
    if _missing(model, named):
        # A plan names experts one by one.
        with experts_apart(model):
            missing = _missing(model, named)
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ArchitectureError(f"the plan names {missing[0]}{more}, which this model does not have; {ANEW}")


def as_carried_out(model: nn.Module, plan: Plan) -> Planned:
    """A plan that was made for the model, without what it says of modules that it removes: an edited one may do that.

    A note names what was left out.
    """
    binding = find_binding(model)
    if binding is None:
        return Planned(plan, ())
    found = without_removed(plan, binding)
    kept = set(_named(found))
    gone = [path for path in _named(plan) if path not in kept]
    if not gone:
        return Planned(plan, ())
    more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
    return Planned(found, (f"the plan removes {gone[0]}{more}; what else it says of them is left out",))


def _named(plan: Plan) -> list[str]:
    """Modules of which the plan says how they are stored or that they get zeros, each once."""
    return list(dict.fromkeys([*plan.bits, *(plan.weights.modules if plan.weights is not None else ())]))


def _missing(model: nn.Module, paths: list[str]) -> list[str]:
    known = {path for path, _ in model.named_modules(remove_duplicate=False)}
    return [path for path in paths if path not in known]
