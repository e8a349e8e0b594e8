"""Predictions corrected by the few that were tried."""

from __future__ import annotations

import pytest

from hf_shrink.plan import Scheme
from hf_shrink.search.correcting import Corrections, tried_blocks, tried_schemes
from hf_shrink.search.pieces import Piece
from hf_shrink.search.sensitivity import Rounding

W2, W3, W4, W8 = (Scheme(bits) for bits in (2, 3, 4, 8))


def piece(block: int, kind: str = "mlp in", stack: str = "decoder") -> Piece:
    return Piece(f"{block} {kind}", kind, (stack, block), "mlp", {})


def test_factors_lie_between_those_of_the_blocks_and_bits_that_were_tried() -> None:
    corrections = Corrections()
    for block, factor in ((0, 2.0), (4, 8.0)):
        corrections.add(piece(block), W4, 0.5, 0.5 * factor)
    corrections.add(piece(0), W2, 1.0, 3.0)
    corrections.add(piece(2), W2, 0.0, 3.0)  # says nothing
    corrected = corrections.applied(Rounding({W2: 1.0, W3: 1.0, W4: 1.0, W8: 1.0}), piece(2)).damage
    assert corrected == pytest.approx({W2: 3.0, W3: 3.0, W4: 4.0, W8: 4.0})
    assert corrections.factor(piece(9), 4) == pytest.approx(8.0)
    assert corrections.factor(piece(0, "mlp out"), 4) == corrections.factor(piece(0, stack="encoder"), 4) == 1.0
    assert corrections.table()["decoder mlp in, 4 bits, block 4"] == pytest.approx(8.0)


def test_what_is_tried_spans_the_model_and_the_bits() -> None:
    assert tried_blocks(30, 6) == {0, 6, 12, 17, 23, 29}
    assert tried_blocks(2, 6) == {0, 1}
    assert tried_blocks(1, 6) == {0}
    assert list(tried_schemes((W8, W4, W2, W3), 4)) == [W2, W3, W4]
    assert list(tried_schemes((W8, W3), 4)) == [W3]
    assert not tried_schemes((W8,), 4)
