"""What the budget benchmark asks of a search besides a plan: `python budget_job.py JOB`, JSON in and out.

A job is one of ours.py, and kind: "predictions" (predicted and true KL divergence of random plans) or "again" (how long
a second budget takes on the same model).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import windows

PLANS = 30
SHARES = (0.2, 0.5)  # of the dense bytes, between which the random plans' budgets lie
ATTEMPTS = 5  # to draw a plan that is new
TOKENS = 4096  # that a plan is measured on
SECOND = 0.45  # of the bfloat16 bytes, the budget that is planned for again


def loaded(job: dict[str, Any]) -> tuple[Any, Any, list[dict[str, Any]]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(job["threads"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval().to(job.get("device", "cpu"))
    rows = windows(tokenizer, Path(job["calibration"]), job["samples"], job["length"])
    return model, tokenizer, [{"input_ids": row[None]} for row in rows]


def predictions(job: dict[str, Any]) -> dict[str, Any]:
    """Random plans: budgets spread over SHARES, each the best one by predictions that are multiplied at random."""
    import torch
    from scipy.stats import spearmanr

    from hf_shrink.pipeline.searching import Searching
    from hf_shrink.recipe import Budget, Recipe
    from hf_shrink.reporting.progress import Progress
    from hf_shrink.search.solve import Programme
    from hf_shrink.search.swaps import Swaps

    model, _, batches = loaded(job)
    recipe, show = Recipe.from_dict(job["recipe"]), Progress(quiet=not sys.stderr.isatty())
    with torch.no_grad(), Searching.on(model, recipe, batches, job["seed"], show) as search:
        problem = search.problem(search.sensitivity, timed=False)
        plans = []
        for number in range(PLANS):
            share = SHARES[0] + (SHARES[1] - SHARES[0]) * number / (PLANS - 1)
            budget = Budget.from_dict({"bytes": int(share * job["bf16_bytes"])})
            programme = Programme(problem, search.limits(budget, problem))
            swaps = Swaps(programme, job["seed"] + number)
            found = next((f for _ in range(ATTEMPTS) if (f := programme.minimise(swaps.shaken())) not in plans), None)
            if found is not None:
                plans.append(found)
        measured = search.measured(problem)
        true = [measured.divergences(plan, [plan], TOKENS)[0] for plan in plans]
    predicted = [problem.damage(plan) for plan in plans]
    return {
        "plans": [
            {"bytes": problem.cost(plan).bytes, "predicted": p, "true": t}
            for plan, p, t in zip(plans, predicted, true, strict=True)
        ],
        "spearman": float(spearmanr(predicted, true).statistic),
        "sensitivity_seconds": search.sensitivity.seconds,
        "threads": torch.get_num_threads(),
    }


def again(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a whole first run, nothing kept from before, and of planning for a second budget after it."""
    import torch

    from hf_shrink import make_plan, shrink
    from hf_shrink.recipe import Recipe

    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_SHRINK_CACHE"] = folder
        model, tokenizer, batches = loaded(job)
        started = time.perf_counter()
        shrink(model, job["recipe"], tokenizer=tokenizer, calibration=batches, seed=job["seed"], progress=False)
        first = time.perf_counter() - started
        model, tokenizer, batches = loaded(job)
        other = Recipe.from_dict(job["recipe"]).with_overrides(
            [f"budget.bytes={int(SECOND * job['bf16_bytes'])}", "search.generations=0"]
        )
        started = time.perf_counter()
        plan = make_plan(model, other, tokenizer=tokenizer, calibration=batches, seed=job["seed"], progress=False)
        second = time.perf_counter() - started
    return {
        "first_run_seconds": round(first, 2),
        "second_plan_seconds": round(second, 2),
        "share": second / first,
        "bytes": plan.search["bytes"],
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    print(json.dumps({"predictions": predictions, "again": again}[job["kind"]](job)))
