"""Which weights a quantize step stores in another library's format."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_shrink.architectures.binding import Binding
from hf_shrink.errors import RecipeError
from hf_shrink.pipeline.targets import select
from hf_shrink.pipeline.tied import weight_holders
from hf_shrink.plan import FORMATS
from hf_shrink.quantization.base import ModelMethod
from hf_shrink.recipe import QuantizeStep
from hf_shrink.surgery.sizes import module_shape


def resolve_formats(
    model: nn.Module,
    binding: Binding | None,
    step: QuantizeStep,
    method: ModelMethod,
    cut: Mapping[str, tuple[int, int]],
) -> tuple[dict[str, str], list[str]]:
    """The format of every weight that the step stores so, by module path, and notes.

    Targets and ignore choose as for schemes; of what was not named, the method then leaves dense what it cannot store.

    Args:
        cut: (out_features, in_features), by path, of weights that are cut before they are stored.

    Raises:
        RecipeError: nothing is left, or a weight that was named cannot be stored so.
    """
    assert step.format is not None
    chosen = select(model, binding, step)
    shapes = {path: cut.get(path) or _shape(model, path) for path in chosen.paths}
    reasons = method.spares(model, shapes, step.format)
    for paths in weight_holders(model).values():
        for path in paths if len(paths) > 1 else ():
            if path in shapes:
                partner = next(other for other in paths if other != path)
                reasons[path] = f"it shares its weight with {partner}"
    for path, reason in reasons.items():
        if path in chosen.named:
            raise RecipeError(f"{path} cannot be stored as {step.format}: {reason}; take it out of quantize.targets")
    formats = {path: step.format for path in chosen.paths if path not in reasons}
    if not formats:
        reason = next(iter(reasons.values()))
        raise RecipeError(
            f"no weight of this model can be stored as {step.format}: {reason}; quantize with gptq or rtn"
        )
    by_reason: dict[str, list[str]] = {}
    for path, reason in reasons.items():
        by_reason.setdefault(reason, []).append(path)
    notes = []
    for reason, paths in by_reason.items():
        others = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        notes.append(f"{paths[0]}{others} stay dense ({reason})")
    return formats, [*chosen.notes, *notes]


def check_dtypes(model: nn.Module, formats: Mapping[str, str], dtype: str) -> None:
    """See that weights have a dtype that can be stored as planned. `dtype`: of the model by then, as a plan says it.

    Raises:
        RecipeError: bitsandbytes has no 4 bits of a float64 weight.
    """
    for path, form in formats.items():
        weight = model.get_submodule(path).weight
        if dtype == "keep" and FORMATS[form] == 4 and isinstance(weight, Tensor) and weight.dtype == torch.float64:
            raise RecipeError(
                f"{path} is in float64, of which bitsandbytes makes no {form}; say dtype: float32, or quantize with "
                "gptq or rtn"
            )


def _shape(model: nn.Module, path: str) -> tuple[int, int]:
    shape = module_shape(model.get_submodule(path))
    assert shape is not None
    return shape
