"""Excess loss of models with zeros: magnitude, wanda and sparsegpt, unstructured and N:M, with and without refit.

    python sparsity.py --model DIR --calibration emma.txt --held-out mansfieldpark.txt --output sparsity.json

Every variant is shrunk and measured in a process of its own; results are written after each, and a variant that the
file already has is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import run_fresh, write_results

AMOUNTS: Mapping[str, Mapping[str, Any]] = {"50": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda", "refit": False},
    "wanda+refit": {"method": "wanda"},
    "sparsegpt": {"method": "sparsegpt", "refit": False},
    "sparsegpt+refit": {"method": "sparsegpt"},
}
W4 = {"quantize": {"method": "gptq", "scheme": "W4A16", "group_size": 64}}


def recipes() -> dict[str, list[dict[str, Any]] | None]:
    """The steps of every variant by name; None for the dense model."""
    found: dict[str, list[dict[str, Any]] | None] = {"dense": None}
    for amount, keys in AMOUNTS.items():
        for name, how in METHODS.items():
            found[f"{name} {amount}"] = [{"prune": {"what": "weights", **how, **keys}}]
    for amount, keys in AMOUNTS.items():
        found[f"sparsegpt+refit {amount} W4"] = [{"prune": {"what": "weights", "method": "sparsegpt", **keys}}, W4]
    return {**found, "W4": [W4]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--held-out", nargs="+", required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--held-out-samples", type=int, default=10)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="names of variants; dense is always measured")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    protocol = {key: value for key, value in vars(given).items() if key not in ("only", "output")}
    results: dict[str, Any] = {}
    if given.output is not None and given.output.is_file():
        before = json.loads(given.output.read_text())
        results = before["results"] if before["protocol"] == protocol else {}
    for name, steps in recipes().items():
        if name in results or (given.only and name not in ("dense", *given.only)):
            continue
        recipe = None if steps is None else {"steps": steps}
        job = {**protocol, "recipe": recipe, "seed": 0}
        result = run_fresh([sys.executable, str(Path(__file__).with_name("ours.py")), json.dumps(job)], given.threads)
        dense = results.get("dense", result)["perplexity"]
        result["excess_loss"] = {domain: math.log(p / dense[domain]) for domain, p in result["perplexity"].items()}
        results[name] = result
        losses = ", ".join(f"{domain} {loss:.4f}" for domain, loss in result["excess_loss"].items())
        print(f"{name}: {losses}, {result.get('seconds', 0):.0f} s", flush=True)
        write_results("sparsity", {"protocol": protocol, "results": results}, given.output)


if __name__ == "__main__":
    main()
