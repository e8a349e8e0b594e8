"""What stock transformers builds or names otherwise once anything is packed, so that it would load wrong weights."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION


def exchange_reasons(model: PreTrainedModel, packed: Iterable[str]) -> list[str]:
    """Why stock loads the model wrong beside these packed modules, without an error; empty when it does not."""
    packed = list(packed)
    if not packed:
        return []
    reasons = []
    exchanged = [p for p, m in model.named_modules() if type(m).__name__ in MODULES_TO_PATCH_FOR_QUANTIZATION]
    if exchanged:
        reasons.append(
            f"{exchanged[0]}: stock puts another module there when anything is packed, and loses its weights"
        )
    made = [path for path in packed if any(_is_at(path, target) for target in _converted(model))]
    if made:
        reasons.append(
            f"{made[0]}: stock makes its weight from others of the checkpoint, which it cannot where it is packed"
        )
    return reasons


def _converted(model: PreTrainedModel) -> list[str]:
    return [
        target.lstrip("^.").removesuffix("$").removesuffix(".weight")
        for conversion in get_model_conversion_mapping(model)
        if isinstance(conversion, WeightConverter)
        for target in conversion.target_patterns
    ]


def _is_at(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")
