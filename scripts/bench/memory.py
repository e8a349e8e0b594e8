"""Peak memory and time of `shrink_checkpoint` as models get deeper, beside dense loading and llm-compressor.

    python scripts/bench/memory.py --folder /tmp/memory --blocks 4 8 16 32

Llama-shaped checkpoints of random weights, float32, hidden size 1024; every measurement in a process of its own, whose
VmHWM is the peak. Also: whether the deepest one is shrunk in a control group with so little memory that loading it
dense and calibrating in memory fails. Results: results/memory.json; what is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from common import about, run_fresh
from memory_child import SHAPE, block_bytes, outside_bytes
from store import Store

HERE = Path(__file__).resolve().parent
INTERPRETER_MB = 600


def main() -> None:
    options = arguments()
    protocol = {
        "shape": SHAPE,
        "recipe": options.method,
        "samples": options.samples,
        "length": options.length,
        "max_memory": options.max_memory,
        "threads": 1,
    }
    store = Store(options.output, protocol)
    for blocks in options.blocks:
        source = options.folder / f"source-{blocks}"
        if not (source / "config.json").is_file():
            child("make", str(source), str(blocks))
        for kind in ("streamed", "memory") if blocks == max(options.blocks) else ("streamed",):
            measure(store, options, kind, blocks)
    deepest = max(options.blocks)
    if options.limit:
        for kind in ("streamed", "memory"):
            measure(store, options, kind, deepest, limited=True)
    if options.peer is not None:
        measure_peer(store, options, deepest)
    print(json.dumps(summary(store.results), indent=1))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the checkpoints; needs three times the largest")
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--max-memory", default="100MB")
    parser.add_argument(
        "--limit", type=float, metavar="GB", help="also run the deepest with this much memory (as root)"
    )
    parser.add_argument("--peer", type=Path, metavar="PYTHON", help="python of an environment with llm-compressor")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "memory.json")
    return parser.parse_args()


def child(*given: str) -> dict[str, Any]:
    return run_fresh([sys.executable, str(HERE / "memory_child.py"), *given], threads=1)


def measure(store: Store, options: argparse.Namespace, kind: str, blocks: int, limited: bool = False) -> None:
    """Shrink one source; a run that dies of its limit is a result too."""
    name = f"{kind}-{blocks}{'-limited' if limited else ''}"
    if name in store.results:
        return
    given = {
        "kind": kind,
        "source": str(options.folder / f"source-{blocks}"),
        "output": str(options.folder / "out"),
        "method": options.method,
        "samples": options.samples,
        "length": options.length,
        "max_memory": options.max_memory,
        "limit": options.limit * 1e9 if limited else None,
    }
    shutil.rmtree(given["output"], ignore_errors=True)
    try:
        found = child("run", json.dumps(given))
    except RuntimeError as error:
        if not limited:
            raise
        found = {"failed": str(error).splitlines()[0][-200:]}
    result = {"variant": name, "kind": kind, "blocks": blocks, "limit_gb": options.limit if limited else None}
    store.add({**result, **found, "threads": 1, "about": about()})
    store.write(summary(store.results))
    print(json.dumps(store.results[name]), flush=True)


def measure_peer(store: Store, options: argparse.Namespace, blocks: int) -> None:
    """llm-compressor on the same source and the same token ids."""
    name = f"llmcompressor-{blocks}"
    if name in store.results:
        return
    source, output = options.folder / f"source-{blocks}", options.folder / "out"
    shutil.rmtree(output, ignore_errors=True)
    script = HERE / "memory_peer.py"
    command = [str(options.peer), str(script), str(source), str(output), str(options.samples), str(options.length)]
    found = run_fresh(command, threads=1)
    store.add({"variant": name, "kind": "llmcompressor", "blocks": blocks, **found, "threads": 1, "about": about()})
    store.write(summary(store.results))


def summary(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Flatness, the bound, and how straight the line of time over blocks is."""
    runs = {r["blocks"]: r for r in results.values() if r["variant"] == f"streamed-{r['blocks']}"}
    found: dict[str, Any] = {"peak_mb": {n: runs[n]["peak_mb"] for n in sorted(runs)}}
    if len(runs) > 1:
        least, most = min(runs), max(runs)
        found["deepest_over_shallowest"] = round(runs[most]["peak_mb"] / runs[least]["peak_mb"], 3)
    if len(runs) > 2:
        found["r2_of_time"] = round(r_squared([(n, runs[n]["cpu_seconds"]) for n in sorted(runs)]), 5)
    if runs:
        memory = next(iter(runs.values()))["max_memory_mb"]
        bound = (outside_bytes() + 3 * block_bytes()) / 1e6 + memory + INTERPRETER_MB
        found["bound_mb"] = round(bound, 1)
        found["within_bound"] = all(run["peak_mb"] <= bound for run in runs.values())
    others = {r["variant"]: r.get("peak_mb", r.get("failed")) for r in results.values() if r not in runs.values()}
    return {**found, "others": others}


def r_squared(points: list[tuple[float, float]]) -> float:
    """Of the least-squares line through the points."""
    n = len(points)
    mx, my = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    sxx = sum((x - mx) ** 2 for x, _ in points)
    syy = sum((y - my) ** 2 for _, y in points)
    sxy = sum((x - mx) * (y - my) for x, y in points)
    return sxy**2 / (sxx * syy) if sxx and syy else 1.0


if __name__ == "__main__":
    main()
