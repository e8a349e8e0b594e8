"""What options are made of: bits, width and depth; and which of them paid for what a plan saves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from hf_shrink.search.options import Assignment, Group, Option, Problem
from hf_shrink.search.solve import Programme

LEVERS = ("bits", "width", "depth")
Allowed = Callable[[Group, Option], bool]


def levers_of(option: Option) -> frozenset[str]:
    """The levers that an option pulls; none where it leaves everything as it is."""
    change = option.change
    block = change.block
    units = block.query_heads, block.channels, block.cross_heads, block.expert_channels
    cut = any(kept is not None for kept in units)
    found = {"bits": bool(change.schemes), "width": cut, "depth": change.dropped or bool(block.removed)}
    return frozenset(name for name, pulled in found.items() if pulled)


def only(problem: Problem, allowed: Allowed) -> dict[int, list[int]] | None:
    """By group, the options that are allowed, for `Programme.minimise`; None where a group has none."""
    found = {
        place: [number for number, option in enumerate(group.options) if allowed(group, option)]
        for place, group in enumerate(problem.groups)
    }
    return found if all(found.values()) else None


def uniform(problem: Problem, bits: int) -> Assignment | None:
    """The same bits in all blocks, nothing cut and nothing dropped, what lies outside as it is; None: there is none."""
    taken = []
    for group in problem.groups:
        most = max(len(option.change.schemes) for option in group.options) if group.block is not None else 0
        wanted = frozenset({"bits"}) if most else frozenset()
        found = [
            number
            for number, option in enumerate(group.options)
            if levers_of(option) == wanted and [s.bits for s in option.change.schemes.values()] == [bits] * most
        ]
        if not found:
            return None
        taken.append(found[0])
    return tuple(taken) if problem.allowed(taken) else None


def starting_points(programme: Programme) -> list[Assignment]:
    """What the predictions say is best, with all levers and with some alone: the best on what is true may be any.

    Predictions of different levers can be off by different factors, which a choice among all levers makes use of.
    """
    found: list[Assignment] = []
    for levers in (LEVERS, ("bits",), ("bits", "width"), ("bits", "depth")):
        options = only(programme.problem, partial(_within, frozenset(levers)))
        best = None if options is None else programme.minimise(fixed=options)
        if best is not None and best not in found:
            found.append(best)
    return found


def _within(levers: frozenset[str], group: Group, option: Option) -> bool:
    return levers_of(option) <= levers


def paid(problem: Problem, assignment: Sequence[int]) -> dict[str, dict[str, float]]:
    """Bytes that each lever saved, by group: what is cut counts at its dense size, bits for what is left."""
    found: dict[str, dict[str, float]] = {}
    for group, option in zip(problem.groups, problem.taken(assignment), strict=True):
        saved = float(group.options[0].cost.bytes - option.cost.bytes)
        if saved:
            found[group.name] = _split(group, option, saved)
    return found


def paid_in_all(by_group: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The sum over groups."""
    return {lever: sum(parts.get(lever, 0.0) for parts in by_group.values()) for lever in LEVERS}


def _split(group: Group, option: Option, saved: float) -> dict[str, float]:
    levers = levers_of(option)
    if "depth" in levers and not option.change.schemes and "width" not in levers:
        return {"depth": saved}
    if levers == {"width", "bits"}:
        dense = group.options[0].cost.bytes
        for other in group.options:  # the same cut without bits
            if other.change.block == option.change.block and not other.change.schemes and not other.change.dropped:
                width = float(dense - other.cost.bytes)
                return {"width": width, "bits": saved - width}
        for other in group.options:  # the same bits without a cut
            if other.change.schemes == option.change.schemes and other.change.block.keeps_all:
                share = option.cost.bytes / other.cost.bytes
                return {"width": (1 - share) * dense, "bits": saved - (1 - share) * dense}
    return {"bits" if "bits" in levers else "width": saved}
