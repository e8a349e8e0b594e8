"""Calibration batches put together to the size of an optimizer step, which is not the size that calibration likes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

FEWEST = 8  # steps' batches, where there are so many: one of them is held out
TOKENS_OF_OTHER = 64  # what a row without token ids (an image, a clip) counts for


def regrouped(batches: Sequence[Mapping[str, Any]], tokens: int) -> list[Mapping[str, Any]]:
    """Neighbouring batches of one shape (but for their rows) joined up to about `tokens` tokens each, in order.

    Batches that differ in shape or hold anything but tensors stay as they are, and so does one that is larger.
    """
    sizes = [_tokens(batch) for batch in batches]
    most = min(tokens, max(1, sum(sizes) // FEWEST))
    groups: list[list[Mapping[str, Any]]] = []
    held = 0
    for batch, size in zip(batches, sizes, strict=True):
        if groups and held + size <= most and _joins(groups[-1][0], batch):
            groups[-1].append(batch)
            held += size
        else:
            groups.append([batch])
            held = size
    return [
        group[0] if len(group) == 1 else {k: torch.cat([b[k] for b in group]) for k in group[0]} for group in groups
    ]


def _tokens(batch: Mapping[str, Any]) -> int:
    for key in ("decoder_input_ids", "input_ids"):
        if isinstance(batch.get(key), Tensor):
            return int(batch[key].numel())
    return TOKENS_OF_OTHER * max((len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim()), default=1)


def _joins(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether rows of both can stand in one batch."""
    rows = {len(v) if isinstance(v, Tensor) and v.dim() else None for v in first.values()}
    more = {len(v) if isinstance(v, Tensor) and v.dim() else None for v in second.values()}
    if first.keys() != second.keys() or len(rows) != 1 or len(more) != 1 or None in rows | more:
        return False
    return all(first[k].shape[1:] == second[k].shape[1:] and first[k].dtype == second[k].dtype for k in first)
