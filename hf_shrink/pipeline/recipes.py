"""From what the user passes as `recipe` to a validated Recipe (or Plan): names, paths, mappings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from hf_shrink.errors import RecipeError
from hf_shrink.paths import check_name
from hf_shrink.plan import Plan
from hf_shrink.pruning.base import (
    DEPTH,
    EXPERTS,
    HIDDEN,
    VOCABULARY,
    WEIGHTS,
    WIDTH,
    DepthMethod,
    ExpertMethod,
    GradientMethod,
    HiddenMethod,
    VocabularyMethod,
    WeightsMethod,
    WidthMethod,
)
from hf_shrink.quantization.base import METHODS, Method, ModelMethod
from hf_shrink.recipe import CalibrationSpec, PruneStep, QuantizeStep, Recipe
from hf_shrink.registry import did_you_mean
from hf_shrink.resources import recipes_folder
from hf_shrink.transforms import Transform, build_transforms
from hf_shrink.tuning.options import Tuning

RecipeLike = str | Path | Mapping[str, Any] | Recipe
DEFAULT_RECIPE = "w4a16"
BUDGET_RECIPE = "budget-bytes-30"  # where a budget is given and no recipe


def built_in_recipes() -> dict[str, Path]:
    """The compression recipes that ship with the package, by name."""
    return {path.stem: path for path in sorted(recipes_folder("compression").glob("*.yaml"))}


def load_recipe(recipe: RecipeLike) -> Recipe:
    """A validated recipe from a built-in name, a YAML path, a mapping or a Recipe.

    Raises:
        RecipeError: unknown name, key, method, option or value; the message names the nearest valid one.
    """
    loaded = read_recipe(recipe)
    check_methods(loaded)
    return loaded


def read_recipe(recipe: RecipeLike, *, portable: bool = True) -> Recipe:
    """As `load_recipe`, but for the methods and their options, which are not looked at (training has others).

    Args:
        portable: where a file or a mapping does not say it.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return Recipe.from_dict(recipe, portable=portable)
    known = built_in_recipes()
    check_name(recipe, "write a recipe into a .yaml file and pass its path, or pass the mapping that it spells")
    path = Path(recipe)
    if str(recipe) in known:
        path = known[str(recipe)]
    elif not path.is_file():
        raise RecipeError(f"unknown recipe {str(recipe)!r}: no such file, and {did_you_mean(str(recipe), known)}")
    return Recipe.from_yaml(path, portable=portable)


def calibration_of(asked: Recipe | Plan) -> CalibrationSpec:
    """Which data statistics come from. Raises RecipeError where a plan says it wrong."""
    if isinstance(asked, Recipe):
        return asked.calibration
    try:
        return CalibrationSpec(**asked.calibration)
    except TypeError as error:
        raise RecipeError(f"not a plan: calibration: {error}") from error


def check_methods(recipe: Recipe) -> None:
    """Every method exists and takes the options given. Raises RecipeError."""
    for step in recipe.steps:
        if isinstance(step, QuantizeStep):
            quantization_method(step)
            build_transforms(step.transforms)
            Tuning.from_options(step.tune)
        else:
            PRUNE_METHODS[step.what](step)


def quantization_method(step: QuantizeStep) -> Method:
    return METHODS.build(step.method, step.options, _own_keys(QuantizeStep))


def plan_method(plan: Plan) -> Method | None:
    """The method that a plan's weights are stored by. Raises RecipeError where it is not one for what the plan has."""
    if plan.method is None:
        if plan.bits:
            raise RecipeError(
                f"the plan says how {len(plan.bits)} weights are stored, but not by which method (method: null); write "
                "a quantization method there, such as rtn, or take its schemes and formats out"
            )
        return None
    method = METHODS.build(plan.method, plan.options)
    if (plan.schemes if isinstance(method, ModelMethod) else plan.formats) or len(set(plan.formats.values())) > 1:
        raise RecipeError(f"the plan's schemes or formats are not those of method {plan.method}; make it anew")
    return method


def plan_transforms(plan: Plan) -> tuple[Transform, ...]:
    """What is folded into the weights before they are rounded."""
    return build_transforms(plan.transforms)


def depth_method(step: PruneStep) -> DepthMethod:
    return DEPTH.build(step.method, step.options, _own_keys(PruneStep))


def width_method(step: PruneStep) -> WidthMethod:
    return WIDTH.build(step.method, step.options, _own_keys(PruneStep))


def expert_method(step: PruneStep) -> ExpertMethod:
    return EXPERTS.build(step.method, step.options, _own_keys(PruneStep))


def vocabulary_method(step: PruneStep) -> VocabularyMethod:
    return VOCABULARY.build(step.method, step.options, _own_keys(PruneStep))


def vocabulary_texts(recipe: Recipe) -> tuple[str, ...]:
    """Names of the data that say which tokens stay, beside the calibration data."""
    step = recipe.prune("vocabulary")
    return vocabulary_method(step).texts if step is not None else ()


def hidden_method(step: PruneStep) -> HiddenMethod:
    return HIDDEN.build(step.method, step.options, _own_keys(PruneStep))


def weights_method(step: PruneStep) -> WeightsMethod:
    return WEIGHTS.build(step.method, step.options, _own_keys(PruneStep))


def plan_weights_method(plan: Plan) -> WeightsMethod | None:
    """The method that chooses a plan's zeros; None when there are none."""
    return None if plan.weights is None else WEIGHTS.build(plan.weights.method, plan.weights.options)


# How the method of a step is made, by what is pruned.
PRUNE_METHODS: Mapping[str, Callable[[PruneStep], Any]] = {
    "depth": depth_method,
    "vocabulary": vocabulary_method,
    "hidden": hidden_method,
    "experts": expert_method,
    "width": width_method,
    "weights": weights_method,
}


def _own_keys(step: type[Any]) -> set[str]:
    return {field.name for field in fields(step)} - {"options"}


def needs_calibration(recipe: Recipe) -> bool:
    """Whether any step of the recipe looks at data, or a search."""
    if recipe.budget is not None:
        return True
    for step in recipe.steps:
        if isinstance(step, QuantizeStep):
            parts = quantization_method(step), *build_transforms(step.transforms)
            needed = any(part.needs_statistics for part in parts) or bool(step.tune)
        elif step.what in ("depth", "hidden", "experts"):
            needed = True
        elif step.what == "vocabulary":
            needed = not vocabulary_method(step).texts
        elif step.what == "weights":
            needed = weights_method(step).needs_statistics
        else:
            method = width_method(step)
            needed = step.refit or method.needs_statistics or isinstance(method, GradientMethod)
        if needed:
            return True
    return False
