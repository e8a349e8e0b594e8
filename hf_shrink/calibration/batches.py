"""The data a model is run on: batches of inputs, and what is recorded about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_shrink.calibration.inputs import tokenizer_of
from hf_shrink.calibration.recipes import Purpose
from hf_shrink.recipe import CalibrationSpec, EvaluationSpec


@dataclass(frozen=True)
class CalibrationData:
    """What a model is run on.

    Attributes:
        batches: model inputs by name, CPU tensors; at most `batch_size` rows each, as the spec says. Token ids are
            int64; images and sounds have the model's dtype. Text of seq2seq models comes with decoder_input_ids.
        description: one line for the report, for example "128 x 512 tokens of emma.txt".
        details: source, samples, length, batch_size, seed, tokens, dropped_overlap, notes and what else is known.
        tokens: text tokens in all batches, of encoder and decoder, also where they are given as embeddings; 0 for
            models that read none.
    """

    batches: list[dict[str, Tensor]]
    description: str
    details: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know: too little data, a shorter length, random stand-ins."""
        return tuple(self.details.get("notes", ()))

    def texts(self, tokenizer: object) -> list[str]:
        """Every row of text, decoded: what to pass as `exclude` for data that must not overlap with this."""
        decoder = tokenizer_of(tokenizer)
        rows = [row for batch in self.batches if "input_ids" in batch for row in batch["input_ids"].tolist()]
        return [str(decoder.decode(row, skip_special_tokens=True)) for row in rows] if decoder is not None else []


def finish(
    batches: list[dict[str, Tensor]],
    description: str,
    details: Mapping[str, Any],
    notes: Sequence[str],
    spec: CalibrationSpec | EvaluationSpec,
    seed: int,
    purpose: Purpose,
    dtype: torch.dtype | None,
) -> CalibrationData:
    """CalibrationData of these batches, floating-point inputs in `dtype` (None: as they are)."""
    if dtype is not None:
        batches = [{n: v.to(dtype) if v.is_floating_point() else v for n, v in batch.items()} for batch in batches]
    tokens = sum(b[n].numel() for b in batches for n in ("input_ids", "decoder_input_ids") if n in b)
    tokens += sum(
        b[n].shape[:-1].numel() for b in batches for n in ("inputs_embeds", "decoder_inputs_embeds") if n in b
    )
    known = {
        "purpose": purpose,
        **details,
        "samples": sum(len(batch.get("input_ids", next(iter(batch.values())))) for batch in batches),
        "batch_size": spec.batch_size,
        "seed": seed,
        "tokens": tokens,
        "notes": list(notes),
    }
    return CalibrationData(batches, description, known, tokens)
