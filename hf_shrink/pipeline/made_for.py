"""A plan and the model that it is to be carried out on: seen to fit each other before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from hf_shrink.architectures.binding import Binding
from hf_shrink.architectures.linears import is_matrix
from hf_shrink.architectures.weights import weight_refs
from hf_shrink.errors import ArchitectureError, RecipeError
from hf_shrink.pipeline.formats import check_dtypes
from hf_shrink.pipeline.leaves import cut_by, narrowed_by, without_removed
from hf_shrink.pipeline.planning import Planned, experts_apart, find_binding, without_planned
from hf_shrink.pipeline.recipes import plan_method
from hf_shrink.pipeline.slicing import check_hidden
from hf_shrink.pipeline.targets import check_inputs, group_notes, width_of
from hf_shrink.pipeline.weights import unfit
from hf_shrink.plan import Plan
from hf_shrink.quantization.base import ModelMethod
from hf_shrink.surgery import check_plan, module_shape

ANEW = "make the plan anew for this model, with `hf-shrink plan` or make_plan()"


def check_made_for(model: nn.Module, plan: Plan) -> None:
    """See that all of a plan can be carried out on a model, which stays as it is.

    Raises:
        ArchitectureError: the plan was made for another model, or names what this one does not have, as a weight.
        RecipeError: it asks of a weight what cannot be done to it.
    """
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
    if binding is None and plan.prunes:
        raise ArchitectureError(f"only transformers models can be pruned; this is a {own}")
    if binding is not None:
        check_plan(model, plan)
    if binding is not None and plan.hidden is not None:
        with without_planned(model, binding, plan.stacks) as (shallower, _):
            check_hidden(model, shallower, plan.hidden)
    # A plan names experts one by one.
    with experts_apart(model):
        _check_weights(model, binding, without_removed(plan, binding))
    check_inputs(model, plan.schemes)
    _check_formats(model, binding, plan)


def as_carried_out(model: nn.Module, plan: Plan) -> Planned:
    """A plan that was made for the model, as an edited one may not say it itself: without what it says of modules that
    it removes, and with group sizes that divide.

    Notes name what was left out, and the sizes.
    """
    binding = find_binding(model)
    found = without_removed(plan, binding)
    kept = set(_named(found))
    gone = [path for path in _named(plan) if path not in kept]
    notes = []
    if gone:
        more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
        notes.append(f"the plan removes {gone[0]}{more}; what else it says of them is left out")
    with experts_apart(model):
        widths = {path: width_of(model.get_submodule(path)) for path in found.schemes}
        widths |= narrowed_by(model, binding, found)
    schemes = {path: scheme.for_width(widths[path]) for path, scheme in found.schemes.items()}
    return Planned(replace(found, schemes=schemes), (*notes, *group_notes(found.schemes, schemes)))


def _named(plan: Plan) -> list[str]:
    """Modules of which the plan says how they are stored or that they get zeros, each once."""
    return list(dict.fromkeys([*plan.bits, *(plan.weights.modules if plan.weights is not None else ())]))


def _check_weights(model: nn.Module, binding: Binding | None, plan: Plan) -> None:
    """See that whatever gets a scheme or zeros is a weight that can. The model's experts are apart."""
    modules = dict(model.named_modules(remove_duplicate=False))
    _refuse((path for path in _named(plan) if path not in modules), f"which this model does not have; {ANEW}")
    plain = {path for path in plan.bits if is_matrix(modules[path]) or type(modules[path]) is nn.Embedding}
    _refuse(
        (path for path in plan.bits if path not in plain),
        "which is neither a matrix nor a plain embedding, and cannot be stored in few bits; take it out of the plan",
    )
    if plan.weights is None:
        return
    widths = {ref.path: ref.width for ref in weight_refs(model)}
    _refuse((path for path in plan.weights.amounts if path not in widths), f"which is no weight here; {ANEW}")
    narrowed = narrowed_by(model, binding, plan)
    for path, amount in plan.weights.amounts.items():
        if reason := unfit(amount, narrowed.get(path.rpartition(".")[0], widths[path])):
            raise RecipeError(f"{path} cannot be pruned as planned: {reason}; {ANEW}")


def _refuse(paths: Iterable[str], why: str) -> None:
    """Raises ArchitectureError where there are any."""
    if named := list(paths):
        more = f" and {len(named) - 1} more" if len(named) > 1 else ""
        raise ArchitectureError(f"the plan names {named[0]}{more}, {why}")


def _check_formats(model: nn.Module, binding: Binding | None, plan: Plan) -> None:
    """See that the other library can store what the plan says it does."""
    method = plan_method(plan)
    if not plan.formats or not isinstance(method, ModelMethod):
        return
    shapes = {path: module_shape(model.get_submodule(path)) for path in plan.formats}
    shapes |= {path: size for path, size in cut_by(model, binding, plan).items() if path in shapes}
    kind = next(iter(plan.formats.values()))
    for path, reason in method.spares(model, {p: size for p, size in shapes.items() if size}, kind).items():
        raise RecipeError(f"{path} cannot be stored as {kind}: {reason}; take it out of the plan")
    check_dtypes(model, plan.formats, plan.dtype)
