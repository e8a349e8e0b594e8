"""How far hf_shrink reaches: a tiny model of every model type in transformers is bound, pruned, quantized and reloaded.

    python scripts/bench/coverage.py
    python scripts/bench/coverage.py --kinds causal masked
    python scripts/bench/coverage.py --only gpt2 bert --rerun

For every type: whether it can be built from a small config; whether its roles come from the table, from conventions
that were verified, or not at all (quantize only); width pruned = masked; a block removed = skipped, with a KV cache
too; quantized (W4A16, rounded to nearest); saved; loaded again with hf_shrink and, in a process without it, by stock
transformers: right where the report says portable, and never wrong without an error.

Types run one after the other with a time limit each. Every result is in the file at once, and a later run does only
what is missing. Model weights are random; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import RESULTS, ROOT, about

HERE = Path(__file__).resolve().parent
KINDS = ("causal", "masked", "seq2seq", "vision", "audio", "ctc", "speech", "base")
STEPS = ("width", "width_portable", "depth", "quantized")


class Worker:
    """A process that answers JSON lines with JSON lines; started again when it was too slow or died."""

    def __init__(self, script: str) -> None:
        self._command = [sys.executable, str(HERE / script)]
        self._process: subprocess.Popen[str] | None = None

    def ask(self, job: dict[str, Any], seconds: float) -> dict[str, Any] | str:
        """The answer, or why there is none."""
        if self._process is None or self._process.poll() is not None:
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
            )
            seconds += 60  # to import everything
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            self.stop()
            return f"took over {seconds:.0f} seconds"
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._process = None
            return f"its process ended with {code}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def run_type(name: str, class_name: str, ours: Worker, stock: Worker, folder: Path, limit: float) -> dict[str, Any]:
    """Everything about one type."""
    started = time.perf_counter()
    found = ours.ask({"type": name, "class": class_name, "folder": str(folder)}, limit)
    if isinstance(found, str):
        return {"class": class_name, "built": found}
    saved = [step for step in STEPS if isinstance(found.get(step), dict) and found[step].get("saved") == "ok"]
    if saved:
        answers = stock.ask({"class": class_name, "folder": str(folder), "steps": saved}, limit)
        for step in saved:
            said = answers if isinstance(answers, str) else answers[step]
            portable = found[step]["portable"]
            if said != "ok" and not said.startswith("WRONG") and not portable:
                said = f"refused: {said}"
            elif said == "ok" and not portable:
                said = "ok, though reported as not portable"
            found[step]["stock"] = said
    return {**found, "seconds": round(time.perf_counter() - started, 1)}


def ok(row: dict[str, Any], step: str) -> bool:
    """Whether a step worked, was saved, and came back with hf_shrink."""
    found = row.get(step)
    return isinstance(found, dict) and found["status"] == "ok" and found.get("loaded") == "ok"


def wrong(row: dict[str, Any]) -> list[str]:
    """What gave other outputs than it should without an error, or stock did not load though it should."""
    found = []
    for step in STEPS:
        part = row.get(step)
        if isinstance(part, dict):
            said = {key: str(part.get(key, "")) for key in ("status", "loaded", "stock")}
            found += [f"{step} {key}: {text}" for key, text in said.items() if text.startswith("WRONG")]
            if part.get("portable") and said["stock"] not in ("", "ok") and not said["stock"].startswith("WRONG"):
                found.append(f"{step} stock: {said['stock']}")
    return found


def summarise(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Counts over all types."""
    built = {name: row for name, row in rows.items() if row["built"] == "ok"}
    return {
        "types": len(rows),
        "built": len(built),
        "bound": dict(Counter(row["bound"] for row in built.values())),
        "quantized and reloaded": sum(ok(row, "quantized") for row in built.values()),
        "quantized and loaded in stock": sum(
            ok(row, "quantized") and row["quantized"].get("stock") == "ok" for row in built.values()
        ),
        "width pruned = masked, and reloaded": sum(ok(row, "width") for row in built.values()),
        "width pruned, loaded in stock": sum(
            ok(row, "width_portable") and row["width_portable"].get("stock") == "ok" for row in built.values()
        ),
        "depth pruned = skipped, and reloaded": sum(ok(row, "depth") for row in built.values()),
        "depth pruned, loaded in stock": sum(
            ok(row, "depth") and row["depth"].get("stock") == "ok" for row in built.values()
        ),
        "width and depth": sum(ok(row, "width") and ok(row, "depth") for row in built.values()),
        "wrong": {name: found for name, row in built.items() if (found := wrong(row))},
    }


def line(name: str, row: dict[str, Any]) -> str:
    if row["built"] != "ok":
        return f"{name:32} not built: {row['built'][:120]}"
    steps = " ".join(f"{step}:{'yes' if ok(row, step) else 'no'}" for step in STEPS)
    return f"{name:32} {row['bound']:14} {steps} {'; '.join(wrong(row))[:200]}"


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--only", nargs="+", help="these model types")
    parser.add_argument("--rerun", action="store_true", help="also what is in the file already")
    parser.add_argument("--limit", type=float, default=90, help="seconds for one type (default: 90)")
    parser.add_argument("--output", type=Path, default=RESULTS / "coverage.json")
    return parser.parse_args(words)


def write(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**about(), "summary": summarise(rows), "types": dict(sorted(rows.items()))}
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


def main(words: Sequence[str] | None = None) -> int:
    options = arguments(words)
    from coverage_types import types

    wanted = {name: found for name, found in types(options.kinds).items() if not options.only or name in options.only}
    rows: dict[str, dict[str, Any]] = json.loads(options.output.read_text())["types"] if options.output.exists() else {}
    ours, stock = Worker("coverage_check.py"), Worker("coverage_stock.py")
    with tempfile.TemporaryDirectory() as work:
        for name, (kind, class_name) in wanted.items():
            if name in rows and not options.rerun:
                continue
            folder = Path(work) / "type"
            rows[name] = {"kind": kind, **run_type(name, class_name, ours, stock, folder, options.limit)}
            shutil.rmtree(folder, ignore_errors=True)
            print(line(name, rows[name]), flush=True)
            write(options.output, rows)
    ours.stop()
    stock.stop()
    summary = summarise(rows)
    print(json.dumps(summary, indent=1))
    return 1 if summary["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
