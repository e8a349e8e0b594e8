"""What few bits cost while a model is fine-tuned, and rounded after it: accuracy, macro-F1 and size.

    python scripts/bench/training_qat.py                        # everything that is missing in the results file
    python scripts/bench/training_qat.py --only plays:qat-w4 plays:dense --seeds 0
    python scripts/bench/training_qat.py --only none            # run nothing, show the table

Protocol: the tasks of training.py, with their data and settings. `dense` is an ordinary fine-tuning. `qat-*` is the
same with ShrinkCallback, which rounds weights from a tenth of the steps on; `after-*` is `dense`, quantized when it is
trained: `rtn` without data, `gptq` on 512 training rows. Weights of every Linear inside the blocks, groups of 64. What
is measured is the packed model. Every run has a process of its own; the results file is written after each.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import RESULTS, ROOT, about, folder_bytes, run_fresh
from store import OtherProtocol, Store

TASKS = ("plays", "digits")
CACHE = ROOT / ".cache" / "bench" / "training"  # the dense models are those of training.py
GROUP = 64
START = 0.1


def few_bits(scheme: str, method: str = "rtn") -> dict[str, Any]:
    form = {"group_size": GROUP} if scheme.endswith("A16") else {}
    return {"steps": [{"quantize": {"method": method, "scheme": scheme, **form}}]}


# By name, a recipe and whether it is carried out by the callback, or by `shrink` on the trained dense model.
VARIANTS: dict[str, tuple[dict[str, Any] | None, bool]] = {
    "dense": (None, False),
    "qat-w8": (few_bits("W8A16"), True),
    "qat-w8a8": (few_bits("W8A8"), True),
    "qat-w4": (few_bits("W4A16"), True),
    "qat-w3": (few_bits("W3A16"), True),
    "qat-w2": (few_bits("W2A16"), True),
    "after-w4-rtn": (few_bits("W4A16"), False),
    "after-w4-gptq": (few_bits("W4A16", "gptq"), False),
    "after-w3-gptq": (few_bits("W3A16", "gptq"), False),
    "after-w2-gptq": (few_bits("W2A16", "gptq"), False),
}


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", nargs="+", metavar="NAME", help="tasks, task:variant, globs of these, or none")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--threads", type=int, default=1)
    add("--output", type=Path, default=RESULTS / "training_qat.json", help="results file, taken up where it is there")
    add("--job", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def names(seeds: Sequence[int], only: Sequence[str] | None) -> list[str]:
    """The runs that are meant, "task:variant:seed". Raises ValueError for a name that means nothing."""
    every = [f"{task}:{variant}" for task in TASKS for variant in VARIANTS]
    patterns = [] if only is not None and list(only) == ["none"] else list(only or TASKS)
    patterns = [f"{pattern}:*" if ":" not in pattern else pattern for pattern in patterns]
    for pattern in patterns:
        if not any(fnmatchcase(run, pattern) for run in every):
            raise ValueError(f"{pattern!r} names no run; there are {', '.join(TASKS)} and {', '.join(VARIANTS)}")
    chosen = [run for run in every if any(fnmatchcase(run, pattern) for pattern in patterns)]
    return [f"{run}:{seed}" for seed in seeds for run in chosen]


def run(job: Mapping[str, Any]) -> dict[str, Any]:
    """Train one variant and measure it. In a process of its own: everything heavy is imported here."""
    from training_run import trained

    with trained(job, *VARIANTS[job["variant_name"]], CACHE, {"start": START}, optimize=False) as found:
        found.trainer.save_model()
        return {**found.figures, "weight_bytes": folder_bytes(found.folder)}


def summarise(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the seeds that a variant and the dense model both have, and what is lost to it in points of F1."""
    found: dict[str, Any] = {}
    for task, variant in product(TASKS, VARIANTS):
        runs = {r["seed"]: r for r in results.values() if (r["task"], r["variant_name"]) == (task, variant)}
        dense = {r["seed"]: r for r in results.values() if (r["task"], r["variant_name"]) == (task, "dense")}
        seeds = sorted(runs.keys() & dense.keys())
        if seeds:
            keys = ("accuracy", "f1", "loss", "weight_bytes", "cpu_seconds")
            entry: dict[str, Any] = {key: round(mean(runs[s][key] for s in seeds), 4) for key in keys}
            entry["f1_points_lost"] = round(100 * mean(dense[s]["f1"] - runs[s]["f1"] for s in seeds), 2)
            found[f"{task}:{variant}"] = {**entry, "seeds": seeds}
    return found


def show(summary: Mapping[str, Mapping[str, Any]]) -> None:
    print(f"{'':22}{'seeds':>6}{'accuracy':>10}{'macro F1':>10}{'lost':>7}{'MB':>9}{'CPU s':>8}")
    for name, entry in summary.items():
        print(
            f"{name:22}{len(entry['seeds']):>6}{entry['accuracy']:>10.4f}{entry['f1']:>10.4f}"
            f"{entry['f1_points_lost']:>7.2f}{entry['weight_bytes'] / 1e6:>9.2f}{entry['cpu_seconds']:>8.0f}"
        )


def main(words: Sequence[str] | None = None) -> int:
    a = arguments(words)
    if a.job:
        print(json.dumps(run(json.loads(a.job))))
        return 0
    protocol = {"threads": a.threads, "group": GROUP, "start": START}
    try:
        store = Store(a.output, protocol)
        waiting = [name for name in names(a.seeds, a.only) if name not in store.results]
    except (OtherProtocol, ValueError) as error:
        print(f"training_qat.py: {error}", file=sys.stderr)
        return 2
    for number, name in enumerate(waiting, 1):
        print(f"{number}/{len(waiting)} {name} ...", file=sys.stderr, flush=True)
        task, variant, seed = name.split(":")
        job = {"task": task, "variant_name": variant, "seed": int(seed), "threads": a.threads}
        described = about()
        measured = run_fresh([sys.executable, str(Path(__file__).resolve()), "--job", json.dumps(job)], a.threads)
        store.add({"variant": name, **job, "recipe": VARIANTS[variant][0], **measured, "about": described})
        store.write(summarise(store.results))
    show(summarise(store.results))
    print(a.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
