"""What pruning costs while a model is fine-tuned, and without: accuracy, macro-F1 and speed.

    python scripts/bench/training.py                          # everything that is missing in the results file
    python scripts/bench/training.py --only digits --seeds 0 1 2
    python scripts/bench/training.py --only plays:gradual --seeds 0
    python scripts/bench/training.py --only none              # run nothing, show the table

Protocol: `plays` is all-MiniLM-L6-v2 fine-tuned to tell comedies from tragedies and histories in passages of six
spoken lines, split by play; `digits` a small ViT trained on scikit-learn's digits. Variants have the same steps, data
and start, and differ by the callback alone; `gradual-distilled` learns from the trained dense model too, which `after`
prunes with no training behind it. Half of the blocks' parameters go. Every run has a process of its own; the results
file is written after each.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import RESULTS, ROOT, about, run_fresh
from store import OtherProtocol, Store

CACHE = ROOT / ".cache" / "bench" / "training"
TASKS = ("plays", "digits")
WINDOW = {"start": 0.1, "end": 0.6}
ROUNDS = 15  # of the speed measurement, of
BATCH = 64  # rows


def half(method: str, **more: Any) -> dict[str, Any]:
    """A recipe that takes half of the blocks' parameters."""
    prune = {"what": "width", "method": method, "ratio": 0.5, **more}
    return {"portable": False, "steps": [{"prune": prune}]}


# By name, a recipe and whether it is carried out by the callback, or by `shrink` on the trained dense model.
VARIANTS: dict[str, tuple[dict[str, Any] | None, bool]] = {
    "dense": (None, False),
    "gradual": (half("taylor"), True),
    "gradual-distilled": (half("taylor"), True),
    "gradual-movement": (half("movement"), True),
    "gradual-fisher": (half("fisher"), True),
    "after": (half("taylor", refit=False), False),
}
DISTILLED = {"gradual-distilled": {"logits": 0.5, "task": 0.5, "temperature": 2.0}}  # from the dense model of the seed


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", nargs="+", metavar="NAME", help="tasks, task:variant, globs of these, or none")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--threads", type=int, default=1)
    add("--output", type=Path, default=RESULTS / "training.json", help="results file, taken up where it is there")
    add("--job", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def names(seeds: Sequence[int], only: Sequence[str] | None) -> list[str]:
    """The runs that are meant, "task:variant:seed". Raises ValueError for a name that means nothing."""
    every = [f"{task}:{variant}:{seed}" for seed in seeds for task in TASKS for variant in VARIANTS]
    if only is None:
        return every
    if list(only) == ["none"]:
        return []

    def fits(run: str, pattern: str) -> bool:
        task, variant, _ = run.split(":")
        return any(fnmatchcase(name, pattern) for name in (task, f"{task}:{variant}", run))

    for pattern in only:
        if not any(fits(run, pattern) for run in every):
            raise ValueError(f"{pattern!r} names no run; there are tasks {', '.join(TASKS)} and {', '.join(VARIANTS)}")
    return [run for run in every if any(fits(run, pattern) for pattern in only)]


def run(job: Mapping[str, Any]) -> dict[str, Any]:
    """Train one variant and measure it. In a process of its own: everything heavy is imported here."""
    from training_run import trained

    name = job["variant_name"]
    with trained(job, *VARIANTS[name], CACHE, WINDOW, DISTILLED.get(name)) as found:
        named = list(found.model.named_parameters())
        batch = found.trainer.data_collator(found.held_out[:BATCH])
        return {
            **found.figures,
            "parameters": sum(p.numel() for _, p in named),
            "block_parameters": sum(p.numel() for n, p in named if ".layer." in n or ".layers." in n),
            "speedup": round(speedup(found.model, found.task.model(0), batch), 3),
        }


def speedup(model: Any, dense: Any, batch: Mapping[str, Any]) -> float:
    """By how much a forward pass is faster than the dense model's: least CPU seconds of each, in turn."""
    import torch

    least = [float("inf"), float("inf")]
    with torch.no_grad():
        for turn in range(2 * ROUNDS):
            started = time.process_time()
            (model, dense)[turn % 2].eval()(**batch)
            least[turn % 2] = min(least[turn % 2], time.process_time() - started)
    return least[1] / least[0]


def summarise(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the seeds that a variant and the dense model both have, and what is lost to it in points of F1."""
    found: dict[str, Any] = {}
    for task in TASKS:
        for variant in VARIANTS:
            runs = {r["seed"]: r for r in results.values() if (r["task"], r["variant_name"]) == (task, variant)}
            dense = {r["seed"]: r for r in results.values() if (r["task"], r["variant_name"]) == (task, "dense")}
            seeds = sorted(runs.keys() & dense.keys())
            if seeds:
                keys = ("accuracy", "f1", "parameters", "block_parameters", "speedup")
                entry: dict[str, Any] = {key: round(mean(runs[s][key] for s in seeds), 4) for key in keys}
                entry["f1_points_lost"] = round(100 * mean(dense[s]["f1"] - runs[s]["f1"] for s in seeds), 2)
                found[f"{task}:{variant}"] = {**entry, "seeds": seeds}
    return found


def show(summary: Mapping[str, Mapping[str, Any]]) -> None:
    print(f"{'':26}{'seeds':>6}{'accuracy':>10}{'macro F1':>10}{'lost':>7}{'in blocks':>12}{'speed':>8}")
    for name, entry in summary.items():
        print(
            f"{name:26}{len(entry['seeds']):>6}{entry['accuracy']:>10.4f}{entry['f1']:>10.4f}"
            f"{entry['f1_points_lost']:>7.2f}{entry['block_parameters']:>12,.0f}{entry['speedup']:>7.2f}x"
        )


def main(words: Sequence[str] | None = None) -> int:
    a = arguments(words)
    if a.job:
        print(json.dumps(run(json.loads(a.job))))
        return 0
    protocol = {"threads": a.threads, "window": WINDOW}
    try:
        store = Store(a.output, protocol)
        waiting = [name for name in names(a.seeds, a.only) if name not in store.results]
    except (OtherProtocol, ValueError) as error:
        print(f"training.py: {error}", file=sys.stderr)
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
