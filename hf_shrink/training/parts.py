"""From a recipe to the parts that carry it out while a model is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hf_shrink.architectures.bound import Cuts
from hf_shrink.errors import RecipeError
from hf_shrink.recipe import PruneStep, Recipe
from hf_shrink.training.part import Cutting, Part


def build_parts(recipe: Recipe | None, calibration: Any, tokenizer: Any, seed: int) -> list[Part]:
    """A part for every step of the recipe, in its order; for no recipe the zeros that the model has are kept.

    Args:
        calibration, tokenizer, seed: as for `shrink`, for a quantize step that is to start from data.

    Raises:
        RecipeError: a step, a method or an option that training does not know.
    """
    if recipe is None:
        from hf_shrink.training.pruning.zeros import KeepZeros

        return [KeepZeros()]
    if recipe.budget is not None:
        raise RecipeError(
            "ShrinkCallback takes steps, no budget: what a search finds is a plan for `shrink`; shrink the model and "
            "train it afterwards"
        )
    if recipe.dtype != "keep":
        raise RecipeError(f"training keeps the model's dtype; leave dtype: {recipe.dtype} out of the recipe")
    if recipe.prune("width") is not None and recipe.prune("weights") is not None:
        raise RecipeError(
            "heads and channels are cut when training ends, so that zeros of the same training would have been chosen "
            "for uncut weights; train with the width step first, and then the small model with the weights step"
        )
    parts: list[Part] = [_prune(step, recipe) for step in recipe.steps if isinstance(step, PruneStep)]
    if recipe.quantize is None:
        return parts
    cuts = next((part.cuts for part in parts if isinstance(part, Cutting)), None)
    return [*parts, _quantize(recipe, cuts, calibration, tokenizer, seed)]


def _prune(step: PruneStep, recipe: Recipe) -> Part:
    if step.what == "width":
        from hf_shrink.training.pruning.width import GradualWidth

        return GradualWidth(step, portable=recipe.portable)
    if step.what == "weights":
        from hf_shrink.training.pruning.weights import GradualWeights

        return GradualWeights(step)
    raise RecipeError(
        f"prune: {{what: {step.what}}} is one cut, not a gradual one: run `shrink` with this step first, and train the "
        "smaller model with what is left of the recipe"
    )


def _quantize(recipe: Recipe, cuts: Callable[[], Cuts] | None, calibration: Any, tokenizer: Any, seed: int) -> Part:
    from hf_shrink.training.qat.part import QuantizationTraining

    return QuantizationTraining(recipe, cuts, calibration=calibration, tokenizer=tokenizer, seed=seed)
