"""Overlapping windows of running text: every token is scored once, with as much context as the stride leaves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_shrink.calibration.batches import CalibrationData
from hf_shrink.calibration.inputs import tokenizer_of
from hf_shrink.calibration.targets import IGNORED, Batch
from hf_shrink.calibration.text import Framing, framing_of
from hf_shrink.errors import CalibrationError


def sliding(data: CalibrationData, tokenizer: object, stride: int, batch_size: int) -> CalibrationData:
    """Consecutive windows of a text as overlapping ones, each `stride` tokens on from the one before.

    The first window is scored whole, every other one where it goes beyond the one before it, so that a token has at
    least length - stride tokens of context. All windows are of the same length; the last one begins earlier to be so.

    Args:
        data: windows that do not overlap, from a text or a data set of texts.
        tokenizer: says which special tokens stand around a window.
        stride: in tokens, up to the length of a window's text.
        batch_size: windows per batch.

    Raises:
        CalibrationError: the windows are not consecutive ones of a text, or the stride is longer than their text.
    """
    rows = _rows_of(data)
    found = tokenizer_of(tokenizer)
    framing = Framing() if found is None else framing_of(found, decoder_only=True)
    first, last = len(framing.prefix), rows.shape[1] - len(framing.suffix)
    text, length = rows[:, first:last].flatten(), last - first
    if stride > length:
        raise CalibrationError(f"a stride of {stride} would leave tokens out of windows of {length}; use a smaller one")
    windows, labels = [], []
    done = 0
    while done < len(text):
        stop = length if not done else min(done + stride, len(text))
        ids = torch.cat([rows[0, :first], text[stop - length : stop], rows[0, last:]])
        scored = torch.full_like(ids, IGNORED)
        new = slice(first + length - (stop - done), first + length)
        scored[new] = ids[new]
        windows.append(ids)
        labels.append(scored)
        done = stop
    batches = _batched(windows, labels, batch_size)
    details = {**data.details, "stride": stride}
    return CalibrationData(batches, f"{data.description} in windows {stride} tokens apart", details, data.tokens)


def _rows_of(data: CalibrationData) -> Tensor:
    """All windows, (windows, length)."""
    plain = all(set(batch) <= {"input_ids", "attention_mask"} for batch in data.batches)
    if not plain or not data.batches or data.details.get("source") in ("self", "given"):
        raise CalibrationError(
            f"a stride needs a running text for a causal language model, and not {data.description}; leave it out, or "
            "give a text file"
        )
    return torch.cat([batch["input_ids"] for batch in data.batches])


def _batched(windows: Sequence[Tensor], labels: Sequence[Tensor], size: int) -> list[Batch]:
    return [
        {
            "input_ids": (ids := torch.stack([*windows[start : start + size]])),
            "attention_mask": torch.ones_like(ids),
            "labels": torch.stack([*labels[start : start + size]]),
        }
        for start in range(0, len(windows), size)
    ]
