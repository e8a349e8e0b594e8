"""Every row of the table of formats in a process that never imports hf_shrink: right logits, or a loud failure."""

from __future__ import annotations

import pytest
from checkpoint.rows import ROWS
from checkpoint.saved import Saved

PORTABLE = [name for name, row in ROWS.items() if row.stock in ("yes", "dequantize")]
OTHERS = [name for name in ROWS if name not in PORTABLE]


@pytest.mark.parametrize("name", PORTABLE)
def test_stock_gives_the_same_logits(name: str, stock_rows: dict[str, Saved]) -> None:
    row = stock_rows[name]
    assert row.stock_error is None
    difference = (row.stock_logits - row.logits).abs().max() / row.logits.abs().max()
    assert difference < 1e-3
    assert row.reasons == ()


@pytest.mark.parametrize("name", PORTABLE)
def test_dequantize_is_asked_for_only_where_stock_needs_it(name: str, saved_rows: dict[str, Saved]) -> None:
    block = saved_rows[name].config().get("quantization_config", {})
    assert block.get("dequantize", False) == (ROWS[name].stock == "dequantize")


@pytest.mark.parametrize("name", OTHERS)
def test_stock_fails_loudly_on_what_is_not_portable(name: str, stock_rows: dict[str, Saved]) -> None:
    row = stock_rows[name]
    assert row.stock_logits is None
    assert row.stock_error is not None
    if "quantization_status" in row.config()["quantization_config"]:
        assert "import hf_shrink" in row.stock_error
    assert any(ROWS[name].stock in reason for reason in row.reasons)


def test_a_tie_is_kept_only_where_both_sides_are_stored_alike(saved_rows: dict[str, Saved]) -> None:
    kept = {name: saved_rows[name].config().get("tie_word_embeddings") for name in ROWS if "head" in name}
    assert kept.pop("t5, head apart") is True  # its config knows no other value
    assert {name for name, tied in kept.items() if tied} == {
        "embedding with tied head",
        "embedding with tied head of another scheme",
    }
    assert all(tied is False for name, tied in kept.items() if "apart" in name)
