"""What the memory benchmark makes of its figures."""

from __future__ import annotations

from typing import Any

import pytest
from bench_figures import bench

memory = bench("memory")


def run(blocks: int, peak: float, seconds: float) -> dict[str, Any]:
    name = f"streamed-{blocks}"
    return {"variant": name, "blocks": blocks, "peak_mb": peak, "cpu_seconds": seconds, "max_memory_mb": 100.0}


def test_flat_memory_and_straight_time() -> None:
    runs = {r["variant"]: r for r in (run(4, 900.0, 11.0), run(8, 905.0, 21.0), run(16, 910.0, 41.0))}
    found = memory.summary({**runs, "memory-16": {"variant": "memory-16", "blocks": 16, "failed": "killed"}})
    assert found["deepest_over_shallowest"] == pytest.approx(910 / 900, abs=1e-3)
    assert found["r2_of_time"] == 1.0
    assert found["within_bound"]
    assert found["others"] == {"memory-16": "killed"}
    runs["streamed-16"]["peak_mb"] = found["bound_mb"] + 1
    assert not memory.summary(runs)["within_bound"]
    assert memory.r_squared([(1, 1), (2, 2), (3, 4)]) == pytest.approx(0.964, abs=1e-3)


def test_figures_of_the_shape() -> None:
    shape = memory.SHAPE
    assert memory.outside_bytes() == 8 * shape["vocab_size"] * shape["hidden_size"]
    assert memory.block_bytes() == 4 * shape["hidden_size"] * (
        4 * shape["hidden_size"] + 3 * shape["intermediate_size"]
    )
