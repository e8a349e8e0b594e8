"""Evolution on true divergence: from what the predictions say on, swap as long as the model's outputs get nearer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from hf_shrink.progress import ProgressCallback, quiet
from hf_shrink.search.options import Assignment
from hf_shrink.search.swaps import Swaps
from hf_shrink.sharding import ranks

WHAT = "refining the plan"


class Measure(Protocol):
    """True divergences of assignments."""

    def divergences(self, base: Assignment, trials: Sequence[Assignment], tokens: int | None) -> list[float]:
        """KL(dense || compressed) in nats a prediction of every trial, on about `tokens` tokens (None: all).

        The same tokens give the same figures. `base`: what the trials differ little from, so that they share its work.
        """


@dataclass(frozen=True)
class Refinement:
    """How long, and on how much, is refined.

    Attributes:
        generations: how many; None: as many as `minutes` allow.
        minutes: no generation starts after them; None: no limit.
        offspring: of a generation.
        tokens: of the last measurement of a generation; the first runs on an eighth of them, the second on half.
        seed: of what is swapped.
    """

    generations: int | None = 12
    minutes: float | None = None
    offspring: int = 12
    tokens: int = 4096
    seed: int = 0


@dataclass(frozen=True)
class Refined:
    """What came of it.

    Attributes:
        assignment: the best that was found.
        divergence: its true divergence on all of the tokens.
        history: the best so far, after the starts and after every generation.
        seen: assignments that were measured.
    """

    assignment: Assignment
    divergence: float
    history: tuple[float, ...]
    seen: int


def refine(
    starts: Sequence[Assignment],
    swaps: Swaps,
    measure: Measure,
    how: Refinement,
    progress: ProgressCallback = quiet,
) -> Refined:
    """The best assignment found from the best of `starts` (EvoPress, Sieberling et al., arXiv 2410.14649).

    A generation's offspring are measured on few tokens, the best quarter on more, and the best of these on all of them
    takes its parent's place where it is nearer to the dense model. So the result is never worse than any start on what
    was measured, and stopping early only gives it less time. With `generations` alone the same seed gives the same
    result; where `minutes` end it, how far it came depends on the machine.
    """
    ends = None if how.minutes is None else time.monotonic() + 60 * how.minutes
    began, seen = time.monotonic(), len(starts)
    progress(WHAT, 0, 1, "measuring what the predictions say is best")
    looks = [max(1, how.tokens // 8), max(1, how.tokens // 2), how.tokens]
    found = measure.divergences(starts[0], starts, how.tokens)
    best = min(range(len(starts)), key=lambda place: (found[place], starts[place]))
    parent, loss = starts[best], found[best]
    known, history, generation = set(starts), [loss], 0
    while how.generations is None or generation < how.generations:
        if not ranks().from_first(ends is None or time.monotonic() < ends):
            break
        _say(progress, how, generation, time.monotonic() - began, loss)
        children = swaps.offspring(parent, known, how.offspring)
        if not children:
            break  # there is nothing else within the budget
        seen += len(children)
        for tokens, survivors in zip(looks, (max(1, how.offspring // 4), 1, 1), strict=True):
            found = measure.divergences(parent, children, tokens)
            order = sorted(range(len(children)), key=lambda place: (found[place], children[place]))[:survivors]
            children, found = [children[place] for place in order], [found[place] for place in order]
        if found[0] < loss:
            parent, loss = children[0], found[0]
        generation += 1
        history.append(loss)
    progress(WHAT, 1, 1, _note(loss))
    return Refined(parent, loss, tuple(history), seen)


def _say(progress: ProgressCallback, how: Refinement, generation: int, seconds: float, loss: float) -> None:
    """How far it is, by whichever of generations and minutes ends first, and how good the best is."""
    shares = []
    if how.generations is not None:
        shares.append((generation / how.generations, generation, how.generations))
    if how.minutes:
        whole = max(1, round(60 * how.minutes))
        shares.append((seconds / whole, min(int(seconds), whole - 1), whole))
    _, done, total = max(shares)
    progress(WHAT, done, total, _note(loss))


def _note(loss: float) -> str:
    return f"best KL {loss:.4g}"
