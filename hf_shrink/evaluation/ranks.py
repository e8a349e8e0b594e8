"""Spearman's rank correlation, of many rows at once."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import rankdata

from hf_shrink.evaluation.bootstrap import Floats


def spearman(first: Floats, second: Floats) -> Any:
    """Correlation of the ranks along the last axis of (..., n) and (..., n): (...); NaN where all values are equal."""
    one, other = (_centred(rankdata(values, axis=-1)) for values in (first, second))
    spread = np.sqrt((one**2).sum(-1) * (other**2).sum(-1))
    return np.divide((one * other).sum(-1), spread, out=np.full(spread.shape, np.nan), where=spread > 0)


def _centred(ranks: Floats) -> Floats:
    centred: Floats = ranks - ranks.mean(-1, keepdims=True)
    return centred
