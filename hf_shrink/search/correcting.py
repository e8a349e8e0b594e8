"""By what factor predictions are off, from the few options that were tried in truth.

What a diagonal leaves out (most of all errors of several tokens that add up through attention) depends on what kind of
piece it is, slowly on how deep it lies, and on the bits where errors are no longer small (2, less so 3).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from hf_shrink.plan import Scheme
from hf_shrink.search.pieces import Piece
from hf_shrink.search.sensitivity import Rounding


@dataclass
class Corrections:
    """Logarithms of measured over predicted damage.

    Attributes:
        logs: by stack and kind of the piece, and bits, then by block.
    """

    logs: dict[tuple[str, str, int], dict[int, float]] = field(default_factory=dict)

    def add(self, piece: Piece, scheme: Scheme, predicted: float, measured: float) -> None:
        """Learn from one trial. One of a piece that costs nothing says nothing."""
        if predicted > 0 and measured > 0:
            stack, block = piece.key
            self.logs.setdefault((stack, piece.kind, scheme.bits), {})[block] = math.log(measured / predicted)

    def factor(self, piece: Piece, bits: int) -> float:
        """Between the blocks that were tried, and for the tried bits that are nearest; 1 where none were."""
        stack, block = piece.key
        known = [tried for name, kind, tried in self.logs if (name, kind) == (stack, piece.kind)]
        if not known:
            return 1.0
        points = self.logs[stack, piece.kind, min(known, key=lambda tried: (abs(tried - bits), tried))]
        places = sorted(points)
        return math.exp(float(np.interp(block, places, [points[place] for place in places])))

    def applied(self, rounding: Rounding, piece: Piece) -> Rounding:
        damage = {scheme: value * self.factor(piece, scheme.bits) for scheme, value in rounding.damage.items()}
        return replace(rounding, damage=damage)

    def table(self) -> Mapping[str, float]:
        """Everything that was learnt, to be shown."""
        return {
            f"{stack} {kind}, {bits} bits, block {block}": math.exp(log)
            for (stack, kind, bits), points in sorted(self.logs.items())
            for block, log in sorted(points.items())
        }


def tried_blocks(count: int, most: int) -> frozenset[int]:
    """At most `most` of so many blocks, evenly spread, the first and the last among them."""
    return frozenset(round(n * (count - 1) / max(min(most, count) - 1, 1)) for n in range(min(most, count)))


def tried_schemes(schemes: Sequence[Scheme], coarse: int) -> Collection[Scheme]:
    """Those up to `coarse` bits: at 2 bits predictions can be off by three times what they are at 4."""
    return sorted((scheme for scheme in schemes if scheme.bits <= coarse), key=lambda scheme: scheme.bits)
