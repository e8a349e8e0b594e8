"""Which weights a recipe trains for few bits, and what cannot be trained so."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from hf_shrink.errors import RecipeError
from hf_shrink.pipeline.planning import Planned, plan_recipe
from hf_shrink.pipeline.recipes import quantization_method
from hf_shrink.pipeline.shrinking import check_not_quantized
from hf_shrink.progress import quiet
from hf_shrink.quantization.base import ModelMethod
from hf_shrink.recipe import QuantizeStep, Recipe
from hf_shrink.transforms import Shifting, build_transforms

NOT_SHIFTED = "inputs were not shifted before training, which moves norms and biases itself"


def plan_training(model: nn.Module, recipe: Recipe) -> Planned:
    """The schemes of the weights that the recipe's quantize step means, on a dense model; other steps are ignored.

    Raises:
        RecipeError: there is no such step, or it asks for what cannot be trained; the message says what to write.
    """
    step = recipe.quantize
    if step is None:
        raise RecipeError("the recipe has no quantize step, so there is nothing to train for few bits; add one")
    shifts = bool(step.transforms) and all(isinstance(t, Shifting) for t in build_transforms(step.transforms))
    step = replace(step, transforms=()) if shifts else step
    _check_step(step)
    check_not_quantized(model)
    planned = plan_recipe(model, replace(recipe, steps=(step,), dtype="keep"), (), 0, quiet)
    modules = dict(model.named_modules())
    for path, scheme in planned.plan.schemes.items():
        if path not in modules:
            raise RecipeError(
                f"{path} is an expert in a 3D parameter, which cannot be trained for few bits; leave experts out of it "
                '(quantize.ignore: ["re:.*experts"]) or quantize the trained model with shrink'
            )
        if scheme.type == "float":
            raise RecipeError(
                f"{path}: {scheme.name} has no steps of one size to learn; train with an integer scheme such as W8A8, "
                "or quantize the trained model with shrink"
            )
    return replace(planned, notes=(*planned.notes, NOT_SHIFTED)) if shifts else planned


def _check_step(step: QuantizeStep) -> None:
    if isinstance(quantization_method(step), ModelMethod):
        raise RecipeError(
            f"{step.format} is bitsandbytes' own format, which quantization-aware training does not know; use an "
            "integer scheme such as W4A16, or fine-tune adapters on the quantized model (QLoRA)"
        )
    for key in ("transforms", "tune"):
        if getattr(step, key):
            effort = f" (here by effort: {step.effort})" if step.effort else ""
            raise RecipeError(
                f"quantize.{key}{effort} does not go with quantization-aware training, which trains the weights and "
                "steps itself; leave it out (effort: balanced has none)"
            )
