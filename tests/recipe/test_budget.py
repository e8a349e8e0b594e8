"""Budgets and search sections: what is read, written back, changed by --set and --budget, and refused."""

from __future__ import annotations

from typing import Any

import pytest

from hf_shrink.errors import RecipeError
from hf_shrink.recipe import Budget, Recipe, SearchSpec
from hf_shrink.recipe.budget import Limit, budget_data

FULL = {
    "portable": False,
    "budget": {"bytes": "30%", "latency": {"decode": "60%", "prefill": "2.5ms"}, "memory": "1.5GB", "context": 8192},
    "search": {"bits": [8, 3, 4], "width": False, "minutes": 5, "effort": "best"},
}


def test_round_trip_and_what_is_filled_in() -> None:
    recipe = Recipe.from_dict(FULL)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert "steps" not in recipe.to_dict()
    assert recipe.budget == Budget(
        Limit(0.3, None, "bytes"),
        Limit(0.6, None, "seconds"),
        Limit(None, 0.0025, "seconds"),
        Limit(None, 1.5e9, "bytes"),
        8192,
    )
    assert recipe.search == SearchSpec((3, 4, 8), width=False, effort="best", minutes=5)
    short = Recipe.from_dict({"budget": {"bytes": "30%", "latency": "60%"}})
    assert short.search == SearchSpec()
    assert short.budget is not None
    assert short.budget.decode == Limit(0.6, None, "seconds")
    assert str(short.budget) == "bytes 30%, decode latency 60%"


@pytest.mark.parametrize(
    ("text", "dense", "expected"),
    [
        ("30%", 1000.0, 300.0),
        ("12.5 %", 1000.0, 125.0),
        ("120MB", 1.0, 120e6),
        ("1.5 GiB", 1.0, 1.5 * 2**30),
        (80_000_000, 1.0, 80e6),
        ("7b", 1.0, 7.0),
        ("100%", 5.0, 5.0),
    ],
)
def test_sizes(text: Any, dense: float, expected: float) -> None:
    limit = Limit.parse(text, "bytes", "budget.bytes")
    assert limit.of(dense) == pytest.approx(expected, rel=1e-12)
    assert Limit.parse(limit.to_data(), "bytes", "again").of(dense) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"budget": {"byte": "30%"}}, "did you mean 'bytes'"),
        ({"budget": {"latency": {"decoding": "60%"}}}, "did you mean 'decode'"),
        ({"budget": {}}, "the budget is empty"),
        ({"budget": {"bytes": None}}, "the budget is empty"),
        ({"budget": "30%"}, "must be a mapping"),
        ({"budget": {"bytes": "0%"}}, "above 0%"),
        ({"budget": {"bytes": "130%"}}, "at most 100%"),
        ({"budget": {"bytes": 0.3}}, "write 30%"),
        ({"budget": {"bytes": "30MBs"}}, "did you mean 'mb'"),
        ({"budget": {"bytes": "25ms"}}, "unknown unit"),
        ({"budget": {"bytes": "big"}}, "a size such as 30% or 120MB"),
        ({"budget": {"latency": "120MB"}}, "for example 60% or 25ms"),
        ({"budget": {"bytes": True}}, "not True"),
        ({"budget": {"bytes": "30%", "context": 4}}, "give memory with it"),
        ({"budget": {"memory": "30%", "context": "long"}}, "whole number of tokens"),
        ({"budget": {"bytes": "30%"}, "steps": [{"quantize": {}}]}, "steps and a budget"),
        ({"steps": [{"quantize": {}}], "search": {"width": True}}, "search goes with a budget"),
        ({"search": {"bits": [4]}}, "list of prune and quantize steps"),
        ({"budget": {"bytes": "30%"}, "search": {"bit": [4]}}, "did you mean 'bits'"),
        ({"budget": {"bytes": "30%"}, "search": {"bits": [1]}}, "from 2 to 8"),
        ({"budget": {"bytes": "30%"}, "search": {"bits": 4}}, "such as \\[2, 3, 4, 8\\]"),
        ({"budget": {"bytes": "30%"}, "search": {"width": "yes"}}, "true or false"),
        ({"budget": {"bytes": "30%"}, "search": {"bits": [], "width": False, "depth": False}}, "nothing to choose"),
        ({"budget": {"bytes": "30%"}, "search": {"effort": "bst"}}, "did you mean 'best'"),
        ({"budget": {"bytes": "30%"}, "search": {"minutes": -1}}, "at least 0"),
        ({"budget": {"bytes": "30%"}, "search": {"rehearse": True, "generations": 0}}, "goes with refinement"),
        ({"budget": {"bytes": "30%"}, "search": {"generations": 1.5}}, "whole number"),
        ({"budgt": {"bytes": "30%"}}, "did you mean 'budget'"),
    ],
)
def test_what_is_refused_says_what_to_write(data: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=f"(?i){message}"):
        Recipe.from_dict(data)


def test_set_reaches_into_budgets() -> None:
    recipe = Recipe.from_dict({"budget": {"bytes": "30%"}})
    changed = recipe.with_overrides(
        ["budget.bytes=40%", "budget.latency.prefill=70%", "search.bits=[4]", "search.minutes=2", "portable=false"]
    )
    assert changed.to_dict()["budget"] == {"bytes": "40%", "latency": {"prefill": "70%"}}
    assert changed.search == SearchSpec((4,), minutes=2)
    assert not changed.portable
    other = changed.with_overrides(["budget.bytes=null", "budget.latency=55%"])
    assert other.to_dict()["budget"] == {"latency": {"decode": "55%"}}
    neither = other.with_overrides(["budget.bytes=20%", "budget.latency.decode=null"])
    assert neither.to_dict()["budget"] == {"bytes": "20%"}
    for bad, message in (
        ("budget.bytes.share=1", "has no keys"),
        ("search.widht=true", "did you mean 'width'"),
        ("quantize.scheme=W4A16", "no quantize step"),
        ("budged.bytes=3%", "did you mean 'budget'"),
    ):
        with pytest.raises(RecipeError, match=message):
            recipe.with_overrides([bad])
    with pytest.raises(RecipeError, match="no budget"):
        Recipe.from_dict({"steps": [{"quantize": {}}]}).with_overrides(["budget.bytes=30%"])


def test_budget_options() -> None:
    assert budget_data(["30%"]) == {"bytes": "30%"}
    assert budget_data(["bytes:120 MB", "latency:60%", "latency:prefill:70%", "memory:500MB@8192"]) == {
        "bytes": "120MB",
        "latency": {"decode": "60%", "prefill": "70%"},
        "memory": "500MB",
        "context": 8192,
    }
    assert Budget.from_dict(budget_data(["latency:25ms"])).decode == Limit(None, 0.025, "seconds")
    for bad, message in (
        (["30%", "120MB"], "already"),
        (["latncy:60%"], "did you mean 'latency'"),
        (["memory:decode:60%"], "A budget is 30%"),
    ):
        with pytest.raises(RecipeError, match=message):
            budget_data(bad)
    for bad in (["latency:decoding:60%"], ["memory:1GB@long"]):
        with pytest.raises(RecipeError):
            Budget.from_dict(budget_data(bad))
