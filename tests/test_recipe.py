"""Recipes: what is read, what is refused and which valid name the message offers."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_shrink.errors import RecipeError
from hf_shrink.plan import Scheme
from hf_shrink.recipe import PruneStep, QuantizeStep, Recipe

FULL = {
    "portable": False,
    "calibration": {"data": "wikitext", "samples": 4, "length": 32},
    "steps": [
        {"prune": {"what": "depth", "method": "kl_greedy", "blocks": 2}},
        {"prune": {"what": "width", "method": "wanda", "ratio": 0.2, "units": "mlp", "refit": False}},
        {"quantize": {"scheme": "W4A16", "ignore": [], "overrides": {"lm_head": {"scheme": "W8A16"}}, "damping": 0.1}},
    ],
    "evaluation": {"metrics": ["perplexity"]},
}


def test_round_trip_through_dict_and_yaml(tmp_path: Path) -> None:
    import yaml

    recipe = Recipe.from_dict(FULL)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(FULL))
    loaded = Recipe.from_yaml(path)
    assert loaded.name == "mine"
    assert loaded.steps == recipe.steps
    assert isinstance(loaded.steps[0], PruneStep)
    assert isinstance(loaded.steps[2], QuantizeStep)
    assert loaded.steps[2].options == {"damping": 0.1}
    assert loaded.steps[2].ignore == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": []}, "did you mean 'steps'"),
        ({"calibration": {"sample": 3}}, "did you mean 'samples'"),
        ({"calibration": {"samples": 0}}, "at least 1"),
        ({"evaluation": {"metrics": ["perplexty"]}}, "did you mean 'perplexity'"),
        ({"dtype": "bfloat"}, "did you mean 'bfloat16'"),
        ({"portable": "yes please"}, "true or false"),
        ({"steps": []}, "no steps"),
        ({"steps": "w4a16"}, "must be a list"),
        ({"steps": [{"quantise": {}}]}, "did you mean 'quantize'"),
        ({"steps": [{"prune": {"what": "width", "method": "wanda", "ratio": 1.0}}]}, "below 1"),
        ({"steps": [{"prune": {"what": "width", "method": "wanda", "ratio": -0.1}}]}, "at least 0"),
        ({"steps": [{"prune": {"what": "width", "method": "wanda", "blocks": 1}}]}, "what: depth"),
        ({"steps": [{"prune": {"what": "depth", "method": "kl_greedy"}}]}, "ratio or blocks"),
        ({"steps": [{"prune": {"what": "dept", "method": "kl_greedy", "blocks": 1}}]}, "did you mean 'depth'"),
        ({"steps": [{"prune": {"method": "wanda", "ratio": 0.1}}]}, "needs 'what'"),
        (
            {"steps": [{"prune": {"what": "depth", "method": "kl_greedy", "blocks": 1, "units": "mlp"}}]},
            r"prune\.units goes with what: width; for depth there is parts",
        ),
        (
            {"steps": [{"prune": {"what": "weights", "method": "wanda", "sparsity": 0.5, "units": "mlp"}}]},
            "for weights leave it out",
        ),
        ({"steps": [{"quantize": {"scheme": "W9A16"}}]}, "did you mean 'W8A16'"),
        ({"steps": [{"quantize": {"scheme": "w4a15"}}]}, "did you mean 'W4A16'"),
        ({"steps": [{"quantize": {"strategy": "grup"}}]}, "did you mean 'group'"),
        ({"steps": [{"quantize": {"group_size": 0}}]}, "at least 1"),
        ({"steps": [{"quantize": {"targets": "Linear"}}]}, "is a list"),
        ({"steps": [{"quantize": {"overrides": {"lm_head": {"bits": 8}}}}]}, "unknown key 'bits'"),
        ({"steps": [{"quantize": {}}, {"prune": {"what": "depth", "method": "kl_greedy", "blocks": 1}}]}, "order"),
    ],
)
def test_bad_recipes_say_what_is_valid(change: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict({**FULL, **change})


def test_set_changes_every_step_of_the_kind_and_sections() -> None:
    recipe = Recipe.from_dict(FULL).with_overrides(
        [
            "quantize.group_size=64",
            "calibration.samples=9",
            "prune.depth.ratio=0.5",
            "prune.width.ratio=0.25",
            "portable=true",
        ]
    )
    assert recipe.quantize is not None
    assert recipe.quantize.group_size == 64
    assert recipe.calibration.samples == 9
    assert recipe.portable
    depth, width = recipe.prune("depth"), recipe.prune("width")
    assert depth is not None and width is not None
    assert (depth.ratio, depth.blocks, width.ratio) == (0.5, None, 0.25)
    depth, width = (recipe.with_overrides(["prune.blocks=1"]).prune(kind) for kind in ("depth", "width"))
    assert depth is not None and width is not None  # an amount goes to the steps that take it
    assert (depth.ratio, depth.blocks, width.ratio, width.blocks) == (None, 1, 0.25, None)
    depth, width = (recipe.with_overrides(["prune.refit=false"]).prune(kind) for kind in ("depth", "width"))
    assert depth is not None and width is not None and not depth.refit and not width.refit


@pytest.mark.parametrize("what", ["depth", "hidden", "vocabulary", "experts", "width", "weights"])
@pytest.mark.parametrize(
    ("key", "value", "home"),
    [
        ("units", "mlp", "width"),
        ("parts", "mlp", "depth"),
        ("targets", ["lm_head"], "weights"),
        ("ignore", ["lm_head"], "weights"),
    ],
)
def test_keys_of_one_kind_of_pruning_are_refused_by_the_others(what: str, key: str, value: object, home: str) -> None:
    amounts = {"weights": {"sparsity": 0.5}, "vocabulary": {}}
    step = {"what": what, "method": "mine", **amounts.get(what, {"ratio": 0.2})}
    read = Recipe.from_dict({"steps": [{"prune": step}]})
    assert Recipe.from_dict(read.to_dict()) == read
    asked = {"steps": [{"prune": {**step, key: value}}]}
    if what == home:
        assert Recipe.from_dict(asked) == read.with_overrides([f"prune.{key}={value}"]) != read
        return
    with pytest.raises(
        RecipeError, match=rf"prune\.{key} goes with what: {home}; for {what} (leave it out|there is parts)"
    ):
        Recipe.from_dict(asked)


def test_set_of_a_key_of_one_kind_goes_to_the_steps_of_that_kind() -> None:
    recipe = Recipe.from_dict(FULL).with_overrides(["prune.units=attention", "prune.parts=mlp"])
    depth, width = recipe.prune("depth"), recipe.prune("width")
    assert depth is not None and width is not None
    assert (depth.units, depth.parts, width.units, width.parts) == ("all", "mlp", "attention", "blocks")


def test_an_amount_that_several_steps_take_names_one() -> None:
    recipe = Recipe.from_dict(FULL)
    with pytest.raises(RecipeError, match=r"prune\.depth\.ratio or prune\.width\.ratio"):
        recipe.with_overrides(["prune.ratio=0.5"])
    with pytest.raises(RecipeError, match="no prune step with what: experts"):
        recipe.with_overrides(["prune.experts.ratio=0.5"])


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("quantize.symmetric=maybe", "true or false"),
        ("quantize.group_size=5.5", "whole number"),
        ("quantize.group_size=abc", "whole number"),
        ("quantize.overrides=abc", "mapping"),
        ("quantize.targets=5", "list"),
        ("quantize.ignore=true", "list"),
        ("quantize.method=[1]", "a name"),
        ("quantize.effort=[1]", "effort"),
        ("prune.refit=maybe", "true or false"),
        ("calibration.samples=true", "whole number"),
        ("evaluation.metrics=perplexity", "list"),
        ("evaluation.metrics=5", "list"),
    ],
)
def test_values_of_the_wrong_kind_are_refused(assignment: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict(FULL).with_overrides([assignment])


@pytest.mark.parametrize(
    "text", ["quantize", "quantize=3", "quantise.scheme=W4A16", "calibration.samples=[", "nonsense.x=1"]
)
def test_bad_set_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="--set"):
        Recipe.from_dict(FULL).with_overrides([text])


def test_unreadable_yaml_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("steps: [")
    with pytest.raises(RecipeError, match="not valid YAML"):
        Recipe.from_yaml(path)
    with pytest.raises(RecipeError, match="cannot read"):
        Recipe.from_yaml(tmp_path / "absent.yaml")


def _quantize(**step: object) -> Recipe:
    return Recipe.from_dict({"steps": [{"quantize": step}]})


@pytest.mark.parametrize("name", ["W8A8", "FP8A16"])
def test_by_channel_schemes_pass_over_the_default_group_size(name: str) -> None:
    for step in ({}, {"group_size": 128}, {"group_size": None}, {"strategy": "channel"}):
        recipe = _quantize(scheme=name, **step)
        scheme = recipe.quantize.base_scheme()
        assert (scheme.name, scheme.strategy, scheme.symmetric, scheme.group_size) == (name, "channel", True, None)
        assert Recipe.from_dict(recipe.to_dict()).quantize.base_scheme() == scheme
        assert not {"strategy", "group_size", "symmetric"} & recipe.to_dict()["steps"][0]["quantize"].keys()
    for wrong in ({"group_size": 64}, {"strategy": "tensor"}, {"symmetric": False}):
        with pytest.raises(RecipeError, match=f"{name} has .*take out {next(iter(wrong))}"):
            _quantize(scheme=name, **wrong)


def test_inputs_without_zero_points_are_asked_for_by_name() -> None:
    assert not _quantize(scheme="W8A8").quantize.base_scheme().activation_symmetric
    assert _quantize(scheme="W8A8", symmetric_inputs=True).quantize.base_scheme().activation_symmetric
    mixed = _quantize(scheme="W4A16", symmetric_inputs=True, overrides={"a": {"scheme": "W8A8"}}).quantize
    assert mixed.scheme_with(mixed.overrides["a"]).activation_symmetric
    assert not mixed.base_scheme().activation_symmetric
    for wrong in ({"scheme": "W4A16"}, {"scheme": "FP8A16"}):
        with pytest.raises(RecipeError, match="symmetric_inputs goes with W8A8"):
            _quantize(symmetric_inputs=True, **wrong)


@pytest.mark.parametrize(
    "step",
    [
        {"strategy": "channel", "group_size": 64},
        {"strategy": "tensor", "group_size": 64},
        {"overrides": {"lm_head": {"strategy": "channel", "group_size": 64}}},
        {"strategy": "channel", "overrides": {"lm_head": {"group_size": 64}}},
        {"strategy": "channel", "head": {"scheme": "W8A16", "group_size": 64}},
    ],
    ids=str,
)
def test_a_group_size_without_groups_is_refused(step: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=r"group_size: 64 goes with strategy: group, not with .*; take it out"):
        _quantize(scheme="W4A16", **step)


def test_a_group_size_that_other_weights_use_or_that_is_the_default_is_carried_along() -> None:
    for step in ({}, {"group_size": None}, {"group_size": 128}):
        recipe = _quantize(scheme="W4A16", strategy="channel", **step)
        assert recipe.quantize.base_scheme() == Scheme(4, strategy="channel", group_size=None)
        assert Recipe.from_dict(recipe.to_dict()).quantize.base_scheme() == recipe.quantize.base_scheme()
    finer = _quantize(scheme="W4A16", group_size=64, overrides={"a": {"strategy": "channel"}}).quantize
    assert finer.scheme_with(finer.overrides["a"]).group_size is None
    some = _quantize(strategy="channel", group_size=64, overrides={"a": {"strategy": "group"}}).quantize
    assert some.scheme_with(some.overrides["a"]).group_size == 64
    head = _quantize(strategy="channel", group_size=64, head={"scheme": "W4A16", "strategy": "group"}).quantize
    assert head.head_scheme().group_size == 64
    coarser = _quantize(group_size=64).with_overrides(["quantize.strategy=channel", "quantize.group_size=null"])
    assert coarser.quantize.base_scheme().group_size is None


@pytest.mark.parametrize("step", [{"group_size": None}, {"overrides": {"lm_head": {"group_size": None}}}], ids=str)
def test_no_group_size_says_how_one_scale_a_row_is_asked_for(step: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=r"needs a group_size, such as 128; for one scale a row.* strategy: channel"):
        _quantize(scheme="W4A16", **step)


@pytest.mark.parametrize("scheme", ["W4A16", "FP8A16"])
def test_overrides_of_weights_whose_inputs_stay_refuse_symmetric_inputs(scheme: str) -> None:
    override = {"scheme": scheme, "symmetric_inputs": True}
    with pytest.raises(RecipeError, match=f"{scheme} does not round its inputs"):
        _quantize(scheme="W8A8", overrides={"lm_head": override})
    with pytest.raises(RecipeError, match=f"{scheme} does not round its inputs"):
        _quantize(scheme="W8A8", head=override)
    without = {**override, "symmetric_inputs": False}
    _quantize(scheme="W8A8", symmetric_inputs=True, head=scheme, overrides={"lm_head": without})
    for key in ("symmetric", "symmetric_inputs"):
        with pytest.raises(RecipeError, match=f"{key} must be true or false"):
            _quantize(scheme="W8A8", overrides={"lm_head": {key: "maybe"}})


def test_overrides_between_grouped_and_by_channel_schemes() -> None:
    grouped = _quantize(scheme="W4A16", group_size=32, overrides={"a": {"scheme": "W8A8"}, "b": {"scheme": "W8A16"}})
    schemes = [grouped.quantize.scheme_with(grouped.quantize.overrides[k]) for k in "ab"]
    assert [(s.name, s.group_size) for s in schemes] == [("W8A8", None), ("W8A16", 32)]
    with pytest.raises(RecipeError, match="one scale per channel; take out group_size: 128"):
        _quantize(scheme="W4A16", overrides={"a": {"scheme": "W8A8", "group_size": 128}})
    by_channel = _quantize(scheme="W8A8", overrides={"a": {"scheme": "W4A16"}})
    again = Recipe.from_dict(by_channel.to_dict()).quantize
    assert again.scheme_with(again.overrides["a"]) == by_channel.quantize.scheme_with({"scheme": "W4A16"})
    assert again.scheme_with(again.overrides["a"]).group_size == 128
    assert by_channel.with_overrides(["quantize.scheme=W4A16"]).quantize.base_scheme().group_size == 128
