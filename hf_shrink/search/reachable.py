"""Whether a budget can be met at all, and if not, what stands in the way. Needs no damages, so it is asked first."""

from __future__ import annotations

from hf_shrink.errors import RecipeError
from hf_shrink.recipe import SearchSpec
from hf_shrink.search.limits import Limits, amount
from hf_shrink.search.options import Assignment, Problem
from hf_shrink.search.solve import Programme

NAMES = {
    "bytes": "stored weights",
    "memory": "weights and KV cache",
    "decode": "a decoded token",
    "prefill": "a token of a prompt",
}
SHOWN = 3  # contributions that a message names


def check_reachable(programme: Programme, spec: SearchSpec, portable: bool) -> None:
    """Raises RecipeError where no assignment keeps the limits: with the least that can be, and what takes it."""
    problem, limits = programme.problem, programme.limits
    for resource, most in limits.most.items():
        least = programme.least(resource)
        takes = amount(problem.cost(least), resource, limits.context)
        if takes > most:
            dense = limits.dense[resource]
            raise RecipeError(
                f"the budget asks for at most {said(most, resource)} ({most / dense:.1%}) of {NAMES[resource]}, and "
                f"the least that this search reaches is {said(takes, resource)} ({takes / dense:.1%} of the dense "
                f"model's {said(dense, resource)}). There, {_contributions(problem, least, resource, limits)}. "
                f"{_remedies(problem, spec, portable, resource)}"
            )
    nothing = programme.objective(lambda group, option: 0.0)
    if programme.minimise(nothing) is None:
        each = ", ".join(f"{said(most, name)} of {NAMES[name]}" for name, most in limits.most.items())
        raise RecipeError(f"each limit of the budget can be met, but not all together: {each}; raise one of them")


def said(value: float, resource: str) -> str:
    """A size or a time for people, never rounded to what it is not: 61.23 MB, 4.213 ms."""
    if resource in ("decode", "prefill"):
        return f"{1000 * value:.4g} ms"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.4g} {unit}"
    return f"{value:.0f} bytes"


def _contributions(problem: Problem, least: Assignment, resource: str, limits: Limits) -> str:
    """The largest things in the least assignment: "56.6 MB are model.embed_tokens (as it is), ..."."""
    context = limits.context
    found: list[tuple[float, str]] = [
        (amount(problem.fixed, resource, context), "what the search may not touch (norms and what else stays dense)")
    ]
    inside = 0.0
    for group, option in zip(problem.groups, problem.taken(least), strict=True):
        takes = amount(option.cost, resource, context)
        if group.block is None:
            found.append((takes, f"{group.name} ({option.name})"))
        else:
            inside += takes
    count = sum(problem.depths.values())
    found.append((inside, f"the {count} blocks, with the smallest option everywhere"))
    largest = sorted((pair for pair in found if pair[0] > 0), reverse=True)[:SHOWN]
    return ", ".join(f"{said(takes, resource)} are {name}" for takes, name in largest)


def _remedies(problem: Problem, spec: SearchSpec, portable: bool, resource: str) -> str:
    """What would let the search go lower."""
    ways = ["raise the budget"]
    outside = any(group.block is None and len(group.options) > 1 for group in problem.groups)
    if not outside and spec.embeddings and portable:
        ways.append(
            "set portable: false (--set portable=false), so that embeddings and the output head may be quantized too"
        )
    if not spec.embeddings:
        ways.append("set search.embeddings: true")
    if not spec.depth:
        ways.append("set search.depth: true, so that whole blocks may go")
    if not spec.width:
        ways.append("set search.width: true, so that heads and channels may go")
    if resource in ("bytes", "memory") and (not spec.bits or min(spec.bits) > 2):
        ways.append("allow fewer bits in search.bits")
    if resource == "memory":
        ways.append("state a smaller budget.context")
    return "To get there, " + "; or ".join(ways)
