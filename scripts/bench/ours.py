"""One of our variants (or the dense model) in a process of its own: `python ours.py JOB`, JSON in and out.

A job: model (folder), recipe (or null for the dense model), calibration and held_out (text files), samples,
held_out_samples, length, threads, seed, and where wanted device (the CPU otherwise) and speed: true (that of the dense
model beside it, in turn). Peak memory covers loading and shrinking, not the measurement after it, as in the peers'
runner.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import folder_bytes, peak_memory_mb, perplexity, stopwatch, windows

# Of a search for a budget.
SEARCHED = ("limits", "takes", "predicted_kl", "measured_kl", "rehearsed_kl", "rehearsed_others", "history", "seen")


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Shrink, save and measure in this process."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    device = job.get("device", "cpu")
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    held_out = {
        Path(path).stem: windows(tokenizer, Path(path), job["held_out_samples"], job["length"])
        for path in job["held_out"]
    }
    result: dict[str, Any] = {}
    if job["recipe"] is None:
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval().to(device)
        result["weight_bytes"] = folder_bytes(Path(job["model"]))
    else:
        rows = windows(tokenizer, Path(job["calibration"]), job["samples"], job["length"])
        with stopwatch() as loading:
            from hf_shrink import shrink

            model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval().to(device)
        with stopwatch() as shrinking:
            model = shrink(
                model,
                job["recipe"],
                tokenizer=tokenizer,
                calibration=[{"input_ids": row[None]} for row in rows],
                seed=job["seed"],
                progress=sys.stderr.isatty(),
            )
        result |= shrinking
        result["load_seconds"] = loading["seconds"]
        result["seconds_with_loading"] = round(loading["seconds"] + shrinking["seconds"], 2)
        result["peak_mb"] = peak_memory_mb()
        result["phases"] = {name: round(s, 2) for name, s in model.shrink_report.seconds.items()}
        result["notes"] = list(model.shrink_report.notes)
        plan = model.shrink_record.plan  # a search by the clock finds another one each time
        result["plan"] = plan.summary().splitlines()
        if plan.search:
            result["search"] = {key: plan.search[key] for key in SEARCHED if key in plan.search}
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            result["weight_bytes"] = folder_bytes(Path(folder))
    result["parameters"] = model.num_parameters()
    result["perplexity"] = {domain: perplexity(model, rows) for domain, rows in held_out.items()}
    result["threads"] = torch.get_num_threads()
    if device != "cpu":
        result["device"] = torch.cuda.get_device_name(device)
    if job.get("speed") and job["recipe"] is not None:
        result["speed"] = speeds(job["model"], model)
    return result


def speeds(dense: str, model: Any) -> dict[str, Any]:
    """How much faster than the dense model a prompt is read to its first token and text is written, both in turn."""
    import torch
    from transformers import AutoModelForCausalLM

    from hf_shrink.evaluation.speed import Workload, measure_speed

    other = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    timed = measure_speed({"dense": other, "compressed": model}, Workload(prompt=64, new=64, prefill=512, repeats=5))
    found: dict[str, Any] = {}
    for task in ("decode", "prefill"):
        rates = {name: timings[task].per_second for name, timings in timed.items()}
        medians = {name: rate.median for name, rate in rates.items()}
        spread = {name: [rate.low, rate.high] for name, rate in rates.items()}
        speedup = medians["compressed"] / medians["dense"]
        found[task] = {"unit": "tokens/s", **medians, "speedup": speedup, "spread": spread}
    return found


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
