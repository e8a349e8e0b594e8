"""Made-up benchmark results, and the modules of scripts/bench/, which import one another."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from from_scripts import SCRIPTS

HARDWARE = {"processor": "one", "cores": 2, "memory_gb": 16.0}
DENSE = {"novel": 30.0, "plays": 20.0}


def bench(name: str) -> ModuleType:
    """The module scripts/bench/NAME.py, imported as its neighbours import it."""
    folder = str(SCRIPTS / "bench")
    if folder not in sys.path:
        sys.path.append(folder)
    if not (Path(__file__).parent / name).is_dir():
        return importlib.import_module(name)
    # pytest knows the tests in the folder of that name as a package of that name.
    own = f"bench_{name}"
    if own not in sys.modules:
        spec = importlib.util.spec_from_file_location(own, SCRIPTS / "bench" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[own] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[own])
    return sys.modules[own]


def result(
    name: str,
    kind: str,
    losses: dict[str, float],
    bits: int = 4,
    seconds: float = 100.0,
    symmetric: bool = True,
    group: int | None = 64,
    iterations: int | None = None,
    hardware: dict[str, Any] = HARDWARE,
    threads: int = 1,
) -> dict[str, Any]:
    """A result with the given excess losses over `DENSE`; the dense one itself for kind "dense"."""
    variants = bench("variants")
    setting = None if kind == "dense" else variants.Setting(bits, group, symmetric)
    return {
        **variants.Variant(name, kind, setting, iterations).to_dict(),
        "perplexity": {text: DENSE[text] * math.exp(loss) for text, loss in losses.items()},
        "seconds_with_loading": seconds,
        "peak_mb": 1000.0,
        "weight_bytes": 173_000_000,
        "threads": threads,
        "about": {"date": "2026-11-24", "commit": "abc", "versions": {}, "hardware": hardware},
    }


def by_variant(*results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Results with the dense model's, as the store keeps them."""
    dense = result("dense", "dense", {"novel": 0.0, "plays": 0.0})
    return {r["variant"]: r for r in (dense, *results)}
