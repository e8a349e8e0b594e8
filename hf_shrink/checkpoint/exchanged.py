"""What stock transformers builds or names otherwise once anything is packed, so that it would load wrong weights."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION


def exchange_reasons(model: PreTrainedModel, packed: Iterable[str]) -> list[str]:
    """Why stock loads the model wrong beside these packed modules, or not at all; empty when it does."""
    packed = list(packed)
    if not packed:
        return []
    reasons = []
    exchanged = [p for p, m in model.named_modules() if type(m).__name__ in MODULES_TO_PATCH_FOR_QUANTIZATION]
    if exchanged:
        reasons.append(
            f"{exchanged[0]}: stock puts another module there when anything is packed, and loses its weights"
        )
    converters = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightConverter)]
    made = [path for path in packed if any(_is_at(path, target) for target in _targets(converters))]
    if made:
        reasons.append(
            f"{made[0]}: stock makes its weight from others of the checkpoint, which it cannot where it is packed"
        )
    split = next(filter(_splits, converters), None)
    if split is not None:
        reasons.append(
            f"{split.source_patterns[0]}: stock splits this weight of the checkpoint, which it refuses to do beside "
            "packed ones"
        )
    return reasons


def _targets(converters: Iterable[WeightConverter]) -> list[str]:
    return [
        target.lstrip("^.").removesuffix("$").removesuffix(".weight")
        for converter in converters
        for target in converter.target_patterns
    ]


def _splits(converter: WeightConverter) -> bool:
    """Whether it makes several weights of one: stock adds the names of packed tensors to the one (ValueError)."""
    several = len(converter.target_patterns) > 1 and all(s.endswith(".weight") for s in converter.source_patterns)
    return several and not any(operation.supports_many_to_many for operation in converter.operations)


def _is_at(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")
