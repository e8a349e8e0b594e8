"""Bytes of the text that tokens stand for."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_shrink.calibration.targets import IGNORED


def bytes_of_labels(tokenizer: PreTrainedTokenizerBase, ids: Tensor, labels: Tensor) -> list[int]:
    """UTF-8 bytes of the tokens of each row that are predicted, (rows,).

    Each is measured where it stands, from the text up to it, because what a token is depends on what comes before
    (a leading space, half a character).

    Args:
        ids, labels: (rows, tokens); labels are -100 where nothing is predicted, which must be one stretch at most at
            either end; what lies between the first and the last label is counted.
    """
    return [_bytes(tokenizer, row, found) for row, found in zip(ids, labels, strict=True)]


def _bytes(tokenizer: PreTrainedTokenizerBase, ids: Tensor, labels: Tensor) -> int:
    places = (labels != IGNORED).nonzero()
    if not len(places):
        return 0
    start, stop = int(places[0]), int(places[-1]) + 1
    return _length(tokenizer, ids[:stop]) - _length(tokenizer, ids[:start])


def _length(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> int:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return len(str(text).encode())
