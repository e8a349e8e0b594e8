"""From a ratio to counts: how many units go from which block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from hf_shrink.errors import RecipeError
from hf_shrink.pruning.cheapest import cheapest_choices
from hf_shrink.pruning.parts import HEADS, Choice, Part, Pool, pools_by

TOLERANCE = 0.01  # of the blocks' parameters
ROUND_FROM = 512  # MLPs with fewer channels keep whatever count is exact
WIDE = 2048


@dataclass(frozen=True)
class Request:
    """What a width step asks for.

    Attributes:
        total: parameters of all blocks.
        ratio: the fraction of them to remove.
        measured: whether what units cost can be compared between attention and MLP.
    """

    total: int
    ratio: float
    units: Literal["all", "attention", "mlp"]
    portable: bool
    measured: bool = False

    @property
    def target(self) -> float:
        return self.total * self.ratio

    @property
    def tolerance(self) -> float:
        return self.total * TOLERANCE


@dataclass(frozen=True)
class Allocation:
    """The units that are kept of every part that loses some, and what the user should know."""

    kept: tuple[tuple[Part, tuple[int, ...]], ...]
    removed: int
    notes: tuple[str, ...]


def allocate(parts: Sequence[Part], request: Request) -> Allocation:
    """Decide how many units, and so which, leave every part.

    Units go where a parameter costs least. Portable: the same counts wherever stock reads them from one config key;
    unless costs are measured, attention and MLP in proportion to their sizes as far as whole heads allow.

    Raises:
        RecipeError: so much cannot be removed with at least one unit left everywhere.
    """
    attention = pools_by([p for p in parts if p.kind in HEADS], portable=request.portable)
    mlp = pools_by([p for p in parts if p.kind not in HEADS], portable=request.portable)
    _check_reachable([*attention, *mlp], request)
    if request.portable and not request.measured:
        chosen = _even_choices(attention, mlp, request)
    else:
        chosen = cheapest_choices([*attention, *mlp], request.target)
    chosen = chosen[: len(attention)] + _rounded(mlp, chosen[len(attention) :], request)
    removed = sum(choice.removed for choice in chosen)
    kept = tuple(
        (part, part.kept(choice.way, choice.count))
        for pool, choice in zip([*attention, *mlp], chosen, strict=True)
        for part in pool.parts
        if choice.count
    )
    return Allocation(kept, removed, tuple(_notes(removed, request)))


def _check_reachable(pools: Iterable[Pool], request: Request) -> None:
    most = sum(pool.most for pool in pools)
    if request.target > most + request.tolerance:
        remedies = ["lower ratio"]
        remedies += ["set units: all"] if request.units != "all" else []
        remedies += ["set portable: false"] if request.portable else []
        raise RecipeError(
            f"ratio {request.ratio:g} of units {request.units!r} would leave nothing of them in some block: at most "
            f"{int(most / request.total * 1000) / 10:g}% of the blocks' parameters can be removed"
            f"{' portably' if request.portable else ''}; {', '.join(remedies)} or remove whole blocks (what: depth)"
        )


def _even_choices(attention: list[Pool], mlp: list[Pool], request: Request) -> list[Choice]:
    """Attention first, as near to its proportion as whole units come; MLP channels make up the rest."""
    sizes = sum(pool.size for pool in [*attention, *mlp])
    share = request.target / sizes if sizes else 0.0
    chosen: list[Choice] = []
    carry = 0.0
    for pool in attention:
        wanted = share * pool.size + carry
        limit = request.target - sum(c.removed for c in chosen) if mlp else float("inf")
        choices = pool.nearest(wanted, limit)
        if not mlp:  # nothing makes up for what is missed, so near comes before cheap
            choices = [c for c in choices if abs(c.removed - wanted) <= request.tolerance] or [
                min(choices, key=lambda c: abs(c.removed - wanted))
            ]
        chosen.append(pool.cheaper(choices))
        carry = wanted - chosen[-1].removed
    if mlp:
        chosen = _leave_enough(attention, chosen, request.target - sum(pool.most for pool in mlp) - request.tolerance)
    wanted_of_mlp = request.target - sum(c.removed for c in chosen)
    size = sum(pool.size for pool in mlp)
    return chosen + [pool.nearest(wanted_of_mlp * pool.size / size)[0] for pool in mlp]


def _leave_enough(attention: list[Pool], chosen: list[Choice], least: float) -> list[Choice]:
    """Take more heads, smallest steps first, until MLPs can give the rest."""
    chosen = list(chosen)
    while sum(c.removed for c in chosen) < least:
        steps = [
            (pool.choice(way, count), index)
            for index, pool in enumerate(attention)
            for way in pool.ways
            for count in pool.counts(way)
            if pool.unit(way) * count > chosen[index].removed
        ]
        step, index = min(steps, key=lambda s: s[0].removed - chosen[s[1]].removed)
        chosen[index] = step
    return chosen


def _rounded(pools: list[Pool], chosen: list[Choice], request: Request) -> list[Choice]:
    """Channel counts that are multiples of 32 (64 where wide), if the ratio stays within its tolerance.

    Kernels and quantization groups like such widths. What one pool's rounding misses, the next makes up for.
    """
    exact = sum(choice.removed for choice in chosen)
    if not exact:
        return chosen
    for wide_step in (64, 32):
        rounded: list[Choice] = []
        carry = 0.0
        for pool, choice in zip(pools, chosen, strict=True):
            units, unit = len(pool.parts[0].ways[choice.way]), pool.unit(choice.way)
            wanted = choice.removed + carry
            allowed = pool.counts(choice.way)[1:2] or [1]  # experts: in steps that can be multiplied
            step = (wide_step if units >= WIDE else 32) if units >= ROUND_FROM else allowed[0]
            left = max(round((units - wanted / unit) / step) * step, step)
            left = units if wanted / unit < step / 2 else min(left, units)
            rounded.append(pool.choice(choice.way, units - left))
            carry = wanted - rounded[-1].removed
        if abs(sum(c.removed for c in rounded) - exact) <= request.tolerance:
            return rounded
    return chosen


def _notes(removed: int, request: Request) -> Iterable[str]:
    if abs(removed - request.target) > request.tolerance:
        yield (
            f"asked to remove {request.ratio:.1%} of the blocks' parameters, removed {removed / request.total:.1%}: "
            f"the units ({request.units}) are coarser than that"
        )
