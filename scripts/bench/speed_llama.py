"""llama.cpp's speed in a process of its own: `python speed_llama.py JOB`, JSON in and out.

A job: file, threads, prompt, new, prefill, repeats. Tokens are given, not chosen: no sampling is in its time, while
generate chooses the best token in everyone else's. Weights are read into memory, not mapped.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import library


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Load, warm up, and time."""
    from llama_cpp import Llama

    machine = library("evaluation/machine")
    base = machine.resident_bytes()
    threads = job["threads"]
    model = Llama(job["file"], n_ctx=1024, n_threads=threads, n_threads_batch=threads, use_mmap=False, verbose=False)
    loaded, loading_peak = machine.resident_bytes() - base, machine.peak_bytes() - base
    timings: dict[str, dict[str, Any]] = {}

    def timed(task: str, amount: int, batches: list[list[int]], keep: bool) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        for tokens in batches:
            model.eval(tokens)
        if keep:
            entry = timings.setdefault(task, {"unit": "token", "amount": amount, "seconds": [], "cpu_seconds": []})
            entry["seconds"].append(time.perf_counter() - wall)
            entry["cpu_seconds"].append(time.process_time() - cpu)

    steps = [[200 + number] for number in range(job["new"] - 1)]
    used = peak = 0
    for turn in range(1 + job["repeats"]):
        model.reset()
        timed("first token", job["prompt"], [list(range(100, 100 + job["prompt"]))], turn > 0)
        if turn == 0:
            used, peak = machine.resident_bytes() - base, machine.peak_bytes() - base
        timed("decode", len(steps), steps if turn else steps[:4], turn > 0)
        model.reset()
        timed("prefill", job["prefill"], [list(range(100, 100 + job["prefill"]))], turn > 0)
    return {
        "dtype": "float32",
        "weight_bytes": Path(job["file"]).stat().st_size,
        "timings": timings,
        "memory": {"loaded": loaded, "loading_peak": loading_peak, "used": used, "peak": peak},
        "threads": threads,
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
