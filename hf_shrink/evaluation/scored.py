"""One forward pass of a model, and the part of its outputs that is scored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hf_shrink.architectures.reads import accepted_names
from hf_shrink.calibration.inputs import tokenizer_of
from hf_shrink.calibration.targets import WORDS, Batch, Hidden, Kind, Logits, mask_tokens, model_inputs, targets_of
from hf_shrink.errors import CalibrationError

MASK_SEED = 20_240_229


@dataclass(frozen=True)
class Prepared:
    """How batches of a kind of model are made ready; `mask_id` is set for a masked model whose mask token is known."""

    kind: Kind
    mask_id: int | None
    special: frozenset[int]

    @classmethod
    def of(cls, kind: Kind, model: Any, tokenizer: Any) -> Prepared:
        return cls(kind, *_mask_of(kind, model, tokenizer))

    def of_all(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        # The mask's seed is fixed, not the caller's: figures of different runs stay comparable.
        generator = torch.Generator().manual_seed(MASK_SEED)
        for batch in batches:
            yield batch if self.mask_id is None else mask_tokens(batch, self.mask_id, self.special, generator)


def _mask_of(kind: Kind, model: Any, tokenizer: Any) -> tuple[int | None, frozenset[int]]:
    """The mask token's id, where there is one, and the tokens that are never masked."""
    if kind != "masked":
        return None, frozenset()
    tokenizer = tokenizer_of(tokenizer)
    known = getattr(model.config if tokenizer is None else tokenizer, "mask_token_id", None)
    if known is None:
        return None, frozenset()
    return known, frozenset(() if tokenizer is None else tokenizer.all_special_ids)


def forward(kind: Kind, batch: Batch, model: Any, **options: Any) -> Logits | Hidden:
    """The scored part of a model's outputs; `options` go to its forward as they are."""
    device, dtype = device_of(model), next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    batch = {k: value.to(device, dtype if value.is_floating_point() else None) for k, value in batch.items()}
    inputs: dict[str, Any] = dict(model_inputs(kind, batch))
    if kind in WORDS and "use_cache" in (accepted_names(model) or ()):
        inputs["use_cache"] = False
    outputs = model(**inputs, **options)
    if isinstance(outputs, torch.Tensor):
        outputs = {"logits": outputs}
    if not isinstance(outputs, Mapping):
        raise CalibrationError(f"{type(model).__name__} returns {type(outputs).__name__}; a dict or tensor is needed")
    return targets_of(kind, batch, outputs, model)


def finite(logits: torch.Tensor) -> torch.Tensor:
    """The logits as they are: an argmax over NaN is an ordinary answer. Raises CalibrationError for NaN or infinity."""
    if not bool(torch.isfinite(logits).all()):
        raise CalibrationError(
            "the model puts out NaN or infinite numbers on the evaluation data, so no metric means anything; check the "
            "model with one forward pass, and the note about damping or precision in its report"
        )
    return logits


def device_of(model: Any) -> torch.device:
    """Where the inputs belong: that of the first parameter with data."""
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


def length_of(batch: Batch) -> int:
    """Tokens of a sequence; 0 for inputs that are not text."""
    ids = batch.get("input_ids", batch.get("decoder_input_ids", batch.get("labels")))
    return ids.shape[1] if ids is not None and ids.dim() == 2 else 0
