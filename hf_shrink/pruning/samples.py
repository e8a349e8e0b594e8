"""Small batches for measurements: a seeded choice of calibration samples, few enough tokens at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

AT_ONCE = 1024  # tokens a forward pass, so that logits over a large vocabulary stay small
TOKENS_OF_OTHER = 64  # what a sample without token ids (an image, a clip) counts for


def choose(batches: Sequence[Mapping[str, Any]], tokens: int | None, seed: int) -> list[dict[str, Any]]:
    """Samples of about `tokens` tokens in all (None: every sample), at least one, in batches of at most AT_ONCE tokens.

    A batch whose inputs differ in their number of rows is one sample.
    """
    samples = [(index, row) for index, batch in enumerate(batches) for row in range(rows_of(batch) or 1)]
    if tokens is not None:
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
        picked, left = [], tokens
        for place in order:
            if left <= 0:
                break
            picked.append(samples[place])
            left -= _tokens(batches[samples[place][0]])
        samples = sorted(picked)
    chosen: list[dict[str, Any]] = []
    for index, batch in enumerate(batches):
        rows = [row for i, row in samples if i == index]
        if rows and rows_of(batch) is None:
            chosen.append(dict(batch))
            continue
        step = max(1, AT_ONCE // _tokens(batch))
        chosen += [_select(batch, rows[start : start + step]) for start in range(0, len(rows), step)]
    return chosen


def rows_of(batch: Mapping[str, Any]) -> int | None:
    """How many samples a batch holds; None when its tensors do not agree."""
    sizes = {len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()}
    return sizes.pop() if len(sizes) == 1 else None


def _tokens(batch: Mapping[str, Any]) -> int:
    """Tokens of one sample."""
    for key in ("decoder_input_ids", "input_ids"):
        ids = batch.get(key)
        if isinstance(ids, Tensor) and ids.dim() == 2:
            return max(ids.shape[1], 1)
    return TOKENS_OF_OTHER


def _select(batch: Mapping[str, Any], rows: list[int]) -> dict[str, Any]:
    index = torch.tensor(rows)
    return {
        key: value.index_select(0, index.to(value.device)) if isinstance(value, Tensor) and value.dim() else value
        for key, value in batch.items()
    }
