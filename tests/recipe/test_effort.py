"""Effort levels: what they stand for, and what cannot stand beside them."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from hf_shrink.errors import RecipeError
from hf_shrink.pipeline.recipes import built_in_recipes, load_recipe
from hf_shrink.recipe import QuantizeStep, Recipe
from hf_shrink.recipe.effort import CHOICES, EFFORTS, expand, written_out


def quantize(recipe: Recipe) -> QuantizeStep:
    assert recipe.quantize is not None
    return recipe.quantize


def quantize_effort(recipe: Recipe, effort: str) -> Recipe:
    return recipe.with_overrides([f"quantize.effort={effort}"])


def recipe_with(**step: Any) -> Recipe:
    return Recipe.from_dict({"steps": [{"quantize": step}]})


@pytest.mark.parametrize("effort", EFFORTS)
def test_effort_becomes_what_it_stands_for(effort: str) -> None:
    step = quantize(recipe_with(effort=effort, scheme="W3A16"))
    chosen = EFFORTS[effort]
    assert step.effort == effort
    assert step.method == chosen["method"]
    assert step.transforms == tuple(chosen.get("transforms", ()))
    assert step.tune == chosen.get("tune", {})
    assert step.base_scheme().bits == 3
    load_recipe(recipe_with(effort=effort))  # its method exists


def test_levels_stand_for_different_work_and_only_for_known_keys() -> None:
    assert list(EFFORTS) == ["fast", "balanced", "best"]
    assert len({written_out(chosen) for chosen in EFFORTS.values()}) == 3
    assert all(set(chosen) <= set(CHOICES) for chosen in EFFORTS.values())


@pytest.mark.parametrize("effort", EFFORTS)
def test_what_is_written_out_is_that_very_step(effort: str) -> None:
    text = written_out(EFFORTS[effort])
    assert yaml.safe_load("{" + text + "}") == EFFORTS[effort]


def test_without_effort_a_step_stays_as_it_is() -> None:
    step = {"method": "rtn", "tune": {"steps": 3}}
    assert expand(step) == step


@pytest.mark.parametrize("effort", EFFORTS)
def test_an_expanded_recipe_can_be_read_again(effort: str) -> None:
    recipe = recipe_with(effort=effort, scheme="W2A16", group_size=64, symmetric=False)
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_changing_a_recipe_keeps_that_nothing_is_ignored() -> None:
    recipe = recipe_with(method="rtn", targets=["Linear", "Embedding"], ignore=[])
    assert quantize(quantize_effort(recipe, "balanced")).ignore == ()
    assert quantize(recipe_with(effort="fast").with_overrides([])).ignore is None


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"effort": "bst"}, "did you mean 'best'"),
        ({"effort": 3}, "unknown effort 3"),
        ({"effort": "fast", "method": "gptq"}, "either effort or method"),
        ({"effort": "balanced", "method": "rtn"}, "either effort or method"),
        ({"effort": "fast", "tune": {"steps": 5}}, "either effort or tune"),
        ({"effort": "best", "tune": {"steps": -1}}, "either effort or tune"),
        ({"effort": "best", "tune": {}}, "either effort or tune"),
        ({"effort": "balanced", "transforms": ["nonsense"]}, "either effort or transforms"),
    ],
)
def test_conflicts_say_what_the_effort_stands_for(step: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as raised:
        recipe_with(**step)
    if "either" in message:
        assert written_out(EFFORTS[step["effort"]]) in str(raised.value)


def test_saying_the_same_twice_or_nothing_is_no_conflict() -> None:
    assert recipe_with(effort="fast", method="rtn", transforms=[], tune={}) == recipe_with(effort="fast")


@pytest.mark.parametrize("name", ["w4a16", "w3a16", "w2a16", "prune20-w4a16"])
def test_set_effort_replaces_what_a_built_in_recipe_chose(name: str) -> None:
    before = load_recipe(name)
    for effort, chosen in EFFORTS.items():
        step = quantize(before.with_overrides([f"quantize.effort={effort}"]))
        assert (step.effort, step.method, step.tune) == (effort, chosen["method"], chosen.get("tune", {}))
        assert step.options == {}
        assert step.base_scheme() == quantize(before).base_scheme()


def test_set_effort_takes_out_options_of_the_method_before_and_goes_from_level_to_level() -> None:
    recipe = recipe_with(method="gptq", damping=0.2, targets=["Linear"]).with_overrides(["quantize.effort=fast"])
    step = quantize(recipe)
    assert (step.method, step.options, step.targets) == ("rtn", {}, ("Linear",))
    again = quantize(quantize_effort(recipe, "best"))
    assert (again.method, again.tune) == ("gptq", EFFORTS["best"]["tune"])
    assert quantize(quantize_effort(quantize_effort(recipe, "best"), "fast")).tune == {}


@pytest.mark.parametrize("effort", EFFORTS)
def test_set_scheme_takes_out_what_the_effort_chose_for_the_scheme_before(effort: str) -> None:
    """Under W8A8 some levels shift; that was not asked for by name, and does not stay under other schemes."""
    eight, four = recipe_with(effort=effort, scheme="W8A8"), recipe_with(effort=effort, scheme="W4A16")
    assert eight.with_overrides(["quantize.scheme=W4A16"]) == four
    assert four.with_overrides(["quantize.scheme=w8a8"]) == recipe_with(effort=effort, scheme="w8a8")
    with pytest.raises(RecipeError, match="either effort or method"):
        four.with_overrides(["quantize.method=hqq", "quantize.scheme=W8A8"])


def test_set_scheme_leaves_transforms_that_were_asked_for() -> None:
    recipe = recipe_with(method="gptq", scheme="W8A8", transforms=["shift"])
    assert quantize(recipe.with_overrides(["quantize.scheme=W4A16"])).transforms == ("shift",)


def test_set_of_method_beside_an_effort_is_a_conflict() -> None:
    with pytest.raises(RecipeError, match="either effort or method"):
        recipe_with(effort="best").with_overrides(["quantize.method=rtn"])


def test_built_in_recipes_name_no_effort_beside_a_method() -> None:
    for name, path in built_in_recipes().items():
        for step in yaml.safe_load(path.read_text()).get("steps", []):
            assert not {"effort", "method"} <= set(step.get("quantize", {})), name
