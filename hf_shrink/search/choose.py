"""The best assignment for a budget: what the predictions say, then refined on what is true."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hf_shrink.progress import ProgressCallback, quiet
from hf_shrink.recipe import SearchSpec
from hf_shrink.recipe.search import GENERATIONS
from hf_shrink.search.levers import starting_points
from hf_shrink.search.options import Assignment
from hf_shrink.search.refine import Measure, Refinement, refine
from hf_shrink.search.solve import Programme
from hf_shrink.search.swaps import Swaps


@dataclass(frozen=True)
class Chosen:
    """An assignment, and how good it is.

    Attributes:
        predicted: KL divergence to the dense model in nats a prediction, as predicted.
        measured: the same as measured with weights compressed one by one; None: nothing was measured.
        history: measured, of the best so far, after every generation.
        seen: assignments that were measured.
    """

    assignment: Assignment
    predicted: float
    measured: float | None = None
    history: tuple[float, ...] = ()
    seen: int = 0


def choose_assignment(
    programme: Programme,
    measure: Callable[[], Measure],
    spec: SearchSpec,
    seed: int = 0,
    progress: ProgressCallback = quiet,
) -> Chosen:
    """The assignment that a search settles on; the limits of the programme can be met.

    Args:
        measure: makes what measures true divergences; only called where there is refinement.
    """
    if spec.generations == 0 or spec.minutes == 0:
        found = programme.minimise()
        assert found is not None
        return Chosen(found, programme.problem.damage(found))
    generations = spec.generations if spec.generations is not None or spec.minutes is not None else GENERATIONS
    how = Refinement(generations, spec.minutes, seed=seed)
    refined = refine(starting_points(programme), Swaps(programme, seed), measure(), how, progress)
    predicted = programme.problem.damage(refined.assignment)
    return Chosen(refined.assignment, predicted, refined.divergence, refined.history, refined.seen)
