"""Keep evaluation text out of the calibration data: compare shingles of 50 characters, whatever the tokenizer.

A shingle is a run of `SHINGLE` characters of lower-cased text with its white space collapsed. Two texts that share one
share about a dozen words in a row, which does not happen by chance.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

SHINGLE = 50
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that the polynomial hash modulo 2^64 loses nothing


class OverlapFilter:
    """Says whether a text shares a shingle with any of the excluded texts.

    Args:
        texts: what must not appear in the calibration data.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        normalised = [_normalise(text) for text in texts]
        hashes = [_shingle_hashes(text) for text in normalised]
        self._texts = "\n".join(normalised)
        self._known = np.unique(np.concatenate(hashes)) if hashes else np.empty(0, dtype=np.uint64)

    def overlaps(self, text: str) -> bool:
        """True when `text` has `SHINGLE` consecutive characters, or all it has if fewer, in common with one of them."""
        normalised = _normalise(text)
        if len(normalised) < SHINGLE:
            return bool(normalised) and normalised in self._texts
        return bool(np.isin(_shingle_hashes(normalised), self._known).any())


def _normalise(text: str) -> str:
    return " ".join(text.lower().split())


def _shingle_hashes(normalised: str) -> NDArray[np.uint64]:
    # UTF-32 has one number per character, so that a shingle is as long in every script.
    codes = np.frombuffer(normalised.encode("utf-32-le", errors="replace"), dtype=np.uint32).astype(np.uint64)
    count = len(codes) - SHINGLE + 1
    if count < 1:
        return np.empty(0, dtype=np.uint64)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(SHINGLE):
        hashes = hashes * _BASE + codes[offset : offset + count]
    return hashes
