"""The integer programme against every assignment tried, and budgets that cannot be met."""

from __future__ import annotations

import math

import numpy as np
import pytest
from made_up_problems import DENSE, everything, made_up

from hf_shrink.errors import RecipeError
from hf_shrink.recipe import Budget, SearchSpec
from hf_shrink.search.limits import Limits, amount
from hf_shrink.search.reachable import check_reachable
from hf_shrink.search.solve import Programme


@pytest.mark.parametrize("portable", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_assignment_within_the_limits_is_better(seed: int, portable: bool) -> None:
    problem = made_up(seed, blocks=2, portable=portable)
    all_of_them = everything(problem)
    assert len({problem.cost(a).bytes for a in all_of_them}) > 50
    budgets = [
        {"bytes": "60%"},
        {"bytes": "35%"},
        {"bytes": 1200},
        {"latency": "50%"},
        {"bytes": "45%", "latency": "70%"},
        {"memory": "50%", "context": 40},
    ]
    for data in budgets:
        limits = Limits.of(Budget.from_dict(data), problem.dense)
        within = [a for a in all_of_them if limits.hold(problem.cost(a))]
        best = min(map(problem.damage, within), default=None)
        found = Programme(problem, limits).minimise(gap=0.0)
        if best is None:
            assert found is None
            continue
        assert found is not None
        assert problem.allowed(found)
        assert limits.hold(problem.cost(found))
        assert problem.damage(found) == pytest.approx(best, rel=1e-6)


def test_the_least_of_a_resource_ignores_damages_and_limits() -> None:
    problem = made_up(3, blocks=2)
    programme = Programme(problem, Limits.of(Budget.from_dict({"bytes": 10}), problem.dense))
    for resource in ("bytes", "decode"):
        expected = min(amount(problem.cost(a), resource, 1) for a in everything(problem))
        assert amount(problem.cost(programme.least(resource)), resource, 1) == pytest.approx(expected)


def test_options_may_be_taken_away_and_damages_replaced() -> None:
    problem = made_up(4, blocks=2)
    programme = Programme(problem, Limits.of(Budget.from_dict({"bytes": "50%"}), problem.dense))
    best = programme.minimise()
    assert best is not None
    others = [option for option in range(len(problem.groups[0].options)) if option != best[0]]
    changed = programme.minimise(fixed={0: others, 1: [best[1]] if best[1] != 9 else range(10)})
    assert changed is not None
    assert changed[0] != best[0]
    never = programme.objective(lambda group, option: math.inf if (group, option) == (4, 0) else float(option == 0))
    found = programme.minimise(never)
    assert found is not None
    assert found[4] == 1
    assert np.isinf(never).sum() == 1


def test_a_limit_met_to_the_byte_is_kept_to_the_byte() -> None:
    """HiGHS takes limits as kept that are overrun within a tolerance: here of many bytes."""
    problem = made_up(5, blocks=2)
    sizes = sorted({problem.cost(a).bytes for a in everything(problem)})
    for size in sizes[20::60]:
        for most in (size, size - 1):
            limits = Limits.of(Budget.from_dict({"bytes": most}), problem.dense)
            found = Programme(problem, limits).minimise()
            assert found is not None
            assert problem.cost(found).bytes <= most


def test_a_budget_out_of_reach_says_what_is_the_least_and_why() -> None:
    problem = made_up(0, blocks=2)
    limits = Limits.of(Budget.from_dict({"bytes": "8%"}), problem.dense)
    with pytest.raises(RecipeError) as caught:
        check_reachable(Programme(problem, limits), SearchSpec(depth=False, bits=(3, 4)), portable=True)
    message = str(caught.value)
    least = min(problem.cost(a).bytes for a in everything(problem))
    assert f"{least} bytes ({least / problem.dense.bytes:.1%} of the dense model's" in message
    assert f"{DENSE // 2} bytes are embed (W8)" in message
    assert "search.depth: true" in message
    assert "fewer bits" in message
    both = Limits.of(Budget.from_dict({"bytes": least, "latency": "99%"}), problem.dense)
    check_reachable(Programme(problem, both), SearchSpec(), portable=True)


def test_limits_that_exclude_each_other_are_said_to() -> None:
    problem = made_up(1, blocks=2)
    all_of_them = everything(problem)
    costs = [problem.cost(a) for a in all_of_them]
    least_bytes = min(cost.bytes for cost in costs)
    fastest_of_small = min(cost.seconds["decode"] for cost in costs if cost.bytes <= least_bytes + 400)
    fastest = min(cost.seconds["decode"] for cost in costs)
    if fastest_of_small > fastest:
        most = {"bytes": least_bytes + 400, "decode": (fastest + fastest_of_small) / 2}
        limits = Limits(most, {"bytes": problem.dense.bytes, "decode": problem.dense.seconds["decode"]})
        with pytest.raises(RecipeError, match="not all together"):
            check_reachable(Programme(problem, limits), SearchSpec(), portable=True)
