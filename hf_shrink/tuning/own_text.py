"""Text that the dense model writes itself, tuned on beside the calibration data (LLM-QAT, arXiv 2305.17888).

One text makes a model forget what the others need. Rows are written short, since each token attends to all before it,
and joined like packed documents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_shrink.calibration.data import calibration_batches
from hf_shrink.calibration.inputs import inputs_of
from hf_shrink.calibration.precision import fast_products
from hf_shrink.progress import ProgressCallback
from hf_shrink.recipe import CalibrationSpec
from hf_shrink.tuning.options import Tuning

PIECE = 128  # tokens that are written in one go


def writes_text(model: PreTrainedModel) -> bool:
    """Whether a model reads nothing but text, and writes it from left to right."""
    inputs = inputs_of(model)
    return bool(inputs.generates and inputs.text and not inputs.seq2seq and inputs.media is None)


def own_text(
    model: PreTrainedModel,
    batches: Sequence[Mapping[str, Any]],
    options: Tuning,
    tokenizer: object | None,
    seed: int,
    progress: ProgressCallback,
) -> list[Mapping[str, Any]]:
    """Rows as long as the calibration data's longest, one a batch: `options.own_text` times as much as there is of
    that, but not more than the steps will read. None where the model reads anything but text, or writes no text.

    Args:
        model: dense.
        batches: calibration data.
    """
    shapes = [ids.shape for batch in batches if isinstance(ids := batch.get("input_ids"), Tensor) and ids.dim() == 2]
    if not writes_text(model) or not shapes:
        return []
    share = options.own_text / (1 + options.own_text)
    asked = min(options.own_text * sum(map(math.prod, shapes)), share * options.steps * options.tokens)
    length = max(width for _, width in shapes)
    rows = _written(model, max(1, round(asked / length)), length, tokenizer, seed, progress)
    return [{"input_ids": row[None]} for row in rows]


def spread_evenly(some: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """Two sequences as one, each in its order and evenly over the whole."""
    places = [((index + 0.5) / len(group), item) for group in (some, others) for index, item in enumerate(group)]
    return [item for _, item in sorted(places, key=lambda place: place[0])]


def _written(
    model: PreTrainedModel, rows: int, length: int, tokenizer: object | None, seed: int, progress: ProgressCallback
) -> Tensor:
    """(rows, length) int64."""
    piece = min(PIECE, length)
    spec = CalibrationSpec(data="self", samples=-(-rows * length // piece), length=piece)
    with torch.no_grad(), fast_products(model):
        found = calibration_batches(spec, model=model, tokenizer=tokenizer, seed=seed, progress=progress)
    tokens = torch.cat([batch["input_ids"] for batch in found.batches]).flatten()
    return tokens[: rows * length].view(rows, length)
