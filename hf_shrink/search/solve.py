"""The choice of options that is predicted to damage least within the limits: an integer programme, solved by HiGHS."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from hf_shrink.search.limits import Limits, amount
from hf_shrink.search.options import Assignment, Problem

GAP = 1e-4  # relative, to the best that is possible: far below what predictions are off by
NODES = 20_000  # of the search tree; a count and not a time, so that the same problem gives the same choice
TIGHTENINGS = 20  # attempts to get below a limit that HiGHS overran within its tolerance

Vector = NDArray[np.float64]
Rows = list[tuple[dict[int, float], float, float]]  # coefficients by variable, lower and upper bound


class Programme:
    """A problem and its limits as an integer programme, built once and solved for many objectives.

    There is a variable for every option (1: taken) and one for every name of a switch (1: on). Every group takes one
    option, of every switch one name is on, an option is taken only where the names that it needs are on, and linked
    options are taken together.
    """

    def __init__(self, problem: Problem, limits: Limits) -> None:
        self.problem = problem
        self.limits = limits
        starts = np.cumsum([0, *(len(group.options) for group in problem.groups)])
        self._starts = [int(start) for start in starts]
        names = [name for switch in problem.switches for name in switch]
        self._names = {name: self._starts[-1] + place for place, name in enumerate(names)}
        self._size = self._starts[-1] + len(names)
        self._structure = _constraint(list(self._rows()), self._size)
        self.damages = self.objective(lambda group, option: problem.groups[group].options[option].damage)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Of every group, where the values of its options begin and end in an objective."""
        return list(itertools.pairwise(self._starts))

    def objective(self, value: Callable[[int, int], float]) -> Vector:
        """The vector with `value(group, option)` for every option; options where it is not finite are never taken."""
        found = np.zeros(self._size)
        for group, members in enumerate(self.problem.groups):
            for option in range(len(members.options)):
                found[self._starts[group] + option] = value(group, option)
        return found

    def minimise(
        self, objective: Vector | None = None, fixed: Mapping[int, Sequence[int]] | None = None, gap: float = GAP
    ) -> Assignment | None:
        """The assignment within the limits with the least objective (None: predicted damage); None where there is none.

        Args:
            objective: from `objective`, or random changes of one.
            fixed: by group, the options that it may take; groups that are not named may take any.
            gap: how far the result may be from the best that is possible, relatively.
        """
        objective = self.damages if objective is None else objective
        possible = np.isfinite(objective)
        lower, upper = np.zeros(self._size), possible.astype(float)
        for group, options in (fixed or {}).items():
            start, stop = self._starts[group], self._starts[group + 1]
            allowed = np.zeros(stop - start)
            allowed[list(options)] = 1.0
            upper[start:stop] *= allowed
        costs = np.where(possible, objective, 0.0)
        # HiGHS stops at absolute gaps of 1e-6 too: options must differ by more than that.
        positive = np.abs(costs[costs != 0])
        costs = costs / (np.median(positive) if len(positive) else 1.0)
        most = dict(self.limits.most)
        for _ in range(TIGHTENINGS):
            solved = milp(
                costs,
                integrality=np.ones(self._size),
                bounds=Bounds(lower, upper),
                constraints=[self._structure, *self._limit_rows(most)],
                options={"mip_rel_gap": gap, "node_limit": NODES},
            )
            if solved.x is None:
                return None
            assignment = self._assignment(solved.x)
            over = self._over(assignment)
            if not over:
                return assignment
            for resource, excess in over.items():
                most[resource] -= 2 * excess
        return None

    def least(self, resource: str) -> Assignment:
        """The assignment that takes least of a resource, whatever it damages and whatever the limits are."""
        free = Programme(self.problem, Limits({}, {}, self.limits.context))
        groups = self.problem.groups
        found = free.minimise(
            free.objective(lambda group, o: amount(groups[group].options[o].cost, resource, self.limits.context)),
            gap=0.0,
        )
        assert found is not None  # taking the first option everywhere is always allowed
        return found

    def _rows(self) -> Iterator[tuple[dict[int, float], float, float]]:
        """What every assignment has to fulfil, whatever the limits."""
        problem = self.problem
        for group in range(len(problem.groups)):
            yield dict.fromkeys(range(self._starts[group], self._starts[group + 1]), 1.0), 1.0, 1.0
        for link in problem.links:
            first, *others = (self._starts[group] + option for group, option in link)
            for other in others:
                yield {first: 1.0, other: -1.0}, 0.0, 0.0
        for switch in problem.switches:
            yield {self._names[name]: 1.0 for name in switch}, 1.0, 1.0
        for group, members in enumerate(problem.groups):
            needing: dict[str, dict[int, float]] = {}
            for option, taken in enumerate(members.options):
                for name in taken.needs:
                    needing.setdefault(name, {})[self._starts[group] + option] = 1.0
            for name, options in needing.items():
                yield {**options, self._names[name]: -1.0}, -np.inf, 0.0

    def _limit_rows(self, most: Mapping[str, float]) -> list[LinearConstraint]:
        """A row for each limit, in hundreds of what the dense model takes: HiGHS takes 1e-6 as nothing.

        In finer units its candidates fail its own checks, and it prints that on stdout.
        """
        context = self.limits.context
        rows: Rows = []
        for resource, limit in most.items():
            unit = max(100 * self.limits.dense[resource], 1e-30)
            found = {
                self._starts[group] + option: amount(taken.cost, resource, context) / unit
                for group, members in enumerate(self.problem.groups)
                for option, taken in enumerate(members.options)
            }
            rows.append((found, -np.inf, (limit - amount(self.problem.fixed, resource, context)) / unit))
        return [_constraint(rows, self._size)] if rows else []

    def _assignment(self, values: Vector) -> Assignment:
        return tuple(int(np.argmax(values[start:stop])) for start, stop in self.spans)

    def _over(self, assignment: Assignment) -> dict[str, float]:
        """By how much an assignment overruns limits."""
        taken = self.limits.taken(self.problem.cost(assignment))
        return {name: used - self.limits.most[name] for name, used in taken.items() if used > self.limits.most[name]}


def _constraint(rows: Rows, size: int) -> LinearConstraint:
    places = [(row, variable) for row, (found, _, _) in enumerate(rows) for variable in found]
    values = [value for found, _, _ in rows for value in found.values()]
    index = tuple(np.array(places, dtype=np.int64).reshape(-1, 2).T)
    matrix = coo_array((values, index), shape=(len(rows), size)).tocsc()
    return LinearConstraint(matrix, [low for _, low, _ in rows], [high for _, _, high in rows])
