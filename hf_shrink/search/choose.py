"""The best assignment for a budget: what the predictions say, then refined on what is true."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hf_shrink.errors import RecipeError
from hf_shrink.progress import ProgressCallback, quiet
from hf_shrink.recipe import SearchSpec
from hf_shrink.recipe.search import GENERATIONS
from hf_shrink.search.levers import starting_points
from hf_shrink.search.options import Assignment
from hf_shrink.search.refine import Measure, Refinement, refine
from hf_shrink.search.rehearsed import NEUTRAL, CorrectedMeasure, Factors, Rehearsed
from hf_shrink.search.solve import Programme
from hf_shrink.search.swaps import Swaps

UNSOLVED = "the solver found nothing within the budget, which is next to the least that can be; raise it a little"
GUESSES = 2  # the first of `starting_points`


@dataclass(frozen=True)
class Chosen:
    """An assignment, and how good it is.

    Attributes:
        predicted: KL divergence to the dense model in nats a prediction that a run is predicted to leave.
        measured: what was measured with weights compressed one by one; None: nothing was.
        history: of the best so far, after every generation: measured, times what a run is predicted to leave of it.
        seen: assignments that were measured.
        rehearsed: divergences of whole runs that were tried, the one of this assignment first; empty: none was.
    """

    assignment: Assignment
    predicted: float
    measured: float | None = None
    history: tuple[float, ...] = ()
    seen: int = 0
    rehearsed: tuple[float, ...] = ()


def choose_assignment(
    programme: Programme,
    measure: Callable[[], Measure],
    spec: SearchSpec,
    seed: int = 0,
    progress: ProgressCallback = quiet,
    factors: Factors = NEUTRAL,
    tried: Sequence[Rehearsed] = (),
    rehearse: Callable[[Assignment], Rehearsed] | None = None,
) -> Chosen:
    """The assignment that a search settles on; the limits of the programme can be met.

    Args:
        measure: makes what measures true divergences; only called where there is refinement.
        factors: what runs leave of predicted damages.
        tried: assignments within the limits that were carried out.
        rehearse: carries out what the search finds, of which and of `tried` the best is taken then. None: nothing is.

    Raises:
        RecipeError: the solver finds nothing.
    """
    corrected = Programme(factors.applied(programme.problem), programme.limits)
    if spec.generations == 0 or spec.minutes == 0:
        found = corrected.minimise()
        if found is None:
            raise RecipeError(UNSOLVED)
        return Chosen(found, corrected.problem.damage(found))
    measuring = CorrectedMeasure(measure(), programme.problem, corrected.problem)
    chosen = _refined(corrected, measuring, spec, seed, progress)
    if rehearse is None:
        return chosen
    known = {found.assignment for found in tried}
    candidates = [*tried] if chosen.assignment in known else [*tried, rehearse(chosen.assignment)]
    best = min(candidates, key=lambda found: found.whole)
    others = tuple(found.whole for found in candidates if found is not best)
    predicted = corrected.problem.damage(best.assignment)
    return Chosen(best.assignment, predicted, best.alone_whole, chosen.history, chosen.seen, (best.whole, *others))


def guesses(programme: Programme) -> list[Assignment]:
    """What is worth carrying out to learn what runs leave of damages: the best of all levers, and of bits alone."""
    return starting_points(programme)[:GUESSES]


def _refined(
    programme: Programme, measure: CorrectedMeasure, spec: SearchSpec, seed: int, progress: ProgressCallback
) -> Chosen:
    generations = spec.generations if spec.generations is not None or spec.minutes is not None else GENERATIONS
    how = Refinement(generations, spec.minutes, seed=seed)
    starts = starting_points(programme)
    if not starts:
        raise RecipeError(UNSOLVED)
    refined = refine(starts, Swaps(programme, seed), measure, how, progress)
    predicted = programme.problem.damage(refined.assignment)
    alone = refined.divergence / measure.left(refined.assignment)
    return Chosen(refined.assignment, predicted, alone, refined.history, refined.seen)
