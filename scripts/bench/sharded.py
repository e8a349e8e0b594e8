"""Two processes with one thread each beside one: how much faster they calibrate and solve, and how equal results are.

    python scripts/bench/sharded.py SOURCE --calibration text.txt --held-out other.txt --samples 64

Runs alternate, each in fresh processes; seconds are of the phases "calibrate" and "solve" of a `shrink` in memory. CPU
seconds, of the whole `shrink` and the busiest process, say what a busy machine hides, but not what waiting costs.
Statistics are second moments of the dense model's inputs in its first, middle and last block, compared by their
relative Frobenius distance. The processes are started by torchrun, which is what `accelerate launch` runs on machines
with GPUs. What two cores have to give is measured too: two runs of one process each, at the same time, which share
nothing, do how many times the work of one (`ceiling`; cores that are threads of one core stay far below 2).
Results: results/sharded.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import ROOT, peak_memory_mb, perplexity, stopwatch, windows, write_results

if TYPE_CHECKING:
    import torch

PHASES = ("calibrate", "solve")


def child(job: dict[str, Any]) -> None:
    """One process, alone or of a group: shrink, measure, and write what came of it into the job's folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_shrink import shrink
    from hf_shrink.sharding import together

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    rows = windows(tokenizer, Path(job["calibration"]), job["samples"], job["length"])
    batches = [{"input_ids": part} for part in rows.split(job["batch_size"])]
    with together() as here:
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
        with stopwatch() as walking:
            moments = second_moments(model, batches[: job["walked"]])
        with stopwatch() as shrinking:
            model = shrink(model, job["recipe"], tokenizer=tokenizer, calibration=batches, progress=False)
        seconds = here.gather({phase: model.shrink_report.seconds.get(phase, 0.0) for phase in PHASES})
        cpu, peaks = here.gather(shrinking["cpu_seconds"]), here.gather(peak_memory_mb())
        if here.first:
            held_out = windows(tokenizer, Path(job["held_out"]), job["held_out_samples"], job["length"])
            found = {
                "processes": here.size,
                "seconds": {phase: round(max(s[phase] for s in seconds), 2) for phase in PHASES},
                "shrink_seconds": shrinking["seconds"],
                "cpu_seconds": cpu,
                "walk_seconds": walking["seconds"],
                "peak_mb": peaks,
                "perplexity": perplexity(model, held_out),
            }
            Path(job["folder"], "found.json").write_text(json.dumps(found))
            torch.save(moments, Path(job["folder"], "moments.pt"))
        here.leave()


def second_moments(model: Any, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Of the dense model's inputs to the matrices of three blocks, by path."""
    from hf_shrink.architectures.binding import bind
    from hf_shrink.calibration.walk import StackWalk

    stack = bind(model).stacks[0]
    modules = [block.module for block in stack.blocks]
    walk, found = StackWalk(model, modules, batches), {}
    for block in stack.blocks:
        if block.index in (0, len(modules) // 2, len(modules) - 1):
            matrices = {path: model.get_submodule(path) for path in block.roles}
            found.update({path: s.hessian for path, s in walk.statistics(matrices).items()})
        if block.index + 1 < len(modules):
            walk.advance()
    return found


def run(job: dict[str, Any], processes: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What one process, or several, came to. Raises RuntimeError where they fail."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        script = [str(Path(__file__).resolve()), "--child", json.dumps({**job, "folder": folder})]
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        done = subprocess.run([sys.executable, *(launch if processes > 1 else []), *script], env=environment)
        if done.returncode:
            raise RuntimeError(f"{processes} processes ended with {done.returncode}")
        return json.loads(Path(folder, "found.json").read_text()), torch.load(Path(folder, "moments.pt"))


def at_once(job: dict[str, Any]) -> dict[str, Any]:
    """What the slower of two runs of one process each came to that had the machine at the same time."""
    with ThreadPoolExecutor(2) as pool:
        return max((found for found, _ in pool.map(lambda _: run(job, 1), range(2))), key=worked)


def worked(found: dict[str, Any]) -> float:
    return float(sum(found["seconds"].values()))


def compared(one: list[dict[str, Any]], two: list[dict[str, Any]], distances: dict[str, float]) -> dict[str, Any]:
    """The figures that are asked for, from the rounds of each."""
    seconds = [statistics.median(map(worked, rounds)) for rounds in (one, two)]
    cpu = [min(max(found["cpu_seconds"]) for found in rounds) for rounds in (one, two)]
    perplexities = [rounds[0]["perplexity"] for rounds in (one, two)]
    return {
        "speedup": round(seconds[0] / seconds[1], 3),
        "speedup_in_cpu_seconds": round(cpu[0] / cpu[1], 3),
        "statistics_relative_distance": max(distances.values()),
        "perplexity": [round(value, 4) for value in perplexities],
        "perplexity_ratio": perplexities[1] / perplexities[0],
        "targets": {
            "speedup at least 1.7": seconds[0] / seconds[1] >= 1.7,
            "statistics equal to 1e-5": max(distances.values()) <= 1e-5,
            "perplexity equal to 3 digits": f"{perplexities[0]:.3g}" == f"{perplexities[1]:.3g}",
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--calibration", required=True, metavar="FILE")
    parser.add_argument("--held-out", required=True, metavar="FILE")
    parser.add_argument("--recipe", default="w4a16")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--held-out-samples", type=int, default=20)
    parser.add_argument("--walked", type=int, default=4, help="batches on which statistics are compared")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ceiling", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    from hf_shrink.pipeline.recipes import load_recipe

    recipe = load_recipe(options.recipe).with_overrides([*options.set, "evaluation.metrics=[]"])
    job = {
        "model": options.source,
        "recipe": recipe.to_dict(),
        "calibration": options.calibration,
        "held_out": options.held_out,
        "samples": options.samples,
        "length": options.length,
        "batch_size": options.batch_size,
        "held_out_samples": options.held_out_samples,
        "walked": options.walked,
    }
    rounds: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for _ in range(options.rounds):
        for processes in rounds:
            found, moments[processes] = run(job, processes)
            rounds[processes].append(found)
            print(json.dumps(found), flush=True)
    distances = {
        path: float((moments[2][path] - own).double().norm() / own.double().norm()) for path, own in moments[1].items()
    }
    result = compared(rounds[1], rounds[2], distances)
    pairs = [at_once(job)] if options.ceiling else []
    for pair in pairs:
        ceiling = 2 * statistics.median(map(worked, rounds[1])) / worked(pair)
        result |= {"ceiling": round(ceiling, 3), "of_the_ceiling": round(result["speedup"] / ceiling, 3)}
    print(json.dumps(result, indent=1))
    settings = {key: value for key, value in job.items() if key not in ("model", "calibration", "held_out", "recipe")}
    names = {key: Path(job[key]).name for key in ("model", "calibration", "held_out")}
    content = {**names, **settings, "recipe": options.recipe, "set": options.set, **result}
    every = {**{str(n): found for n, found in rounds.items()}, "two at once": pairs}
    write_results("sharded", {**content, "rounds": every}, options.output)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]))
    else:
        main()
