"""The checkpoints of every row, saved once for all tests of this folder, with what stock transformers makes of them."""

from __future__ import annotations

import pytest
from checkpoint.saved import Saved, run_stock, save_rows
from stock import Stock


@pytest.fixture(scope="session")
def saved_rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    return save_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="session")
def stock_rows(saved_rows: dict[str, Saved], stock_process: Stock) -> dict[str, Saved]:
    return run_stock(saved_rows, stock_process)
