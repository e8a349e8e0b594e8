"""What a checkpoint takes in memory, each in a process of its own: what a process once had may stay with it."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from hf_shrink.checkpoint.measured import load_measured
from hf_shrink.checkpoint.source import model_class, open_source
from hf_shrink.errors import CheckpointError
from hf_shrink.evaluation.machine import peak_bytes, resident_bytes
from hf_shrink.evaluation.made_up import made_up_inputs
from hf_shrink.speed_report import Memory

_CHILD = "import sys; from hf_shrink.evaluation.memory import main; main(sys.argv[1])"


@dataclass(frozen=True)
class Load:
    """How a checkpoint is loaded.

    Attributes:
        folder: folder or Hub id.
        dtype: a name of torch's, or "auto" for the stored one.
        device: "cpu", "cuda", "cuda:1" and so on.
        threads: torch's, on the CPU.
        length: tokens of the first forward pass.
    """

    folder: str
    dtype: str = "auto"
    device: str = "cpu"
    threads: int = 1
    length: int = 64


def measure_memory(load: Load) -> Memory:
    """Load the checkpoint in a fresh process, run it forward once, and count. Linux only; see `can_measure_memory`.

    Raises:
        CheckpointError: the process ended without figures; the message has its last words, or says that it was killed,
            which on Linux means that memory ran out.
    """
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = str(load.threads)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
    }
    command = [sys.executable, "-c", _CHILD, json.dumps(asdict(load))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        words = done.stderr.strip().splitlines()
        reason = "it was killed: too little memory" if done.returncode < 0 else (words or ["it said nothing"])[-1]
        raise CheckpointError(f"{load.folder} in {load.dtype} did not run in a process of its own: {reason}")
    return Memory(**json.loads(lines[-1]))


def main(job: str) -> None:
    """The process of its own: reads a `Load` as JSON, prints a `Memory` as JSON."""
    print(json.dumps(asdict(_measure(Load(**json.loads(job))))))


def _measure(load: Load) -> Memory:
    torch.set_num_threads(load.threads)
    model_class(open_source(load.folder, dense=False))  # imports the model's own file
    torch.ones(8, 8, device=load.device) @ torch.ones(8, 8, device=load.device)  # starts threads, or the accelerator
    base = _resident()
    model = load_measured(load.folder, load.dtype, load.device).model
    loaded, loading_peak = _resident() - base, peak_bytes() - base
    with torch.no_grad():
        model(**made_up_inputs(model, load.length))
    device = device_peak = None
    if load.device != "cpu":
        device = torch.accelerator.memory_allocated(load.device)
        device_peak = torch.accelerator.max_memory_allocated(load.device)
    return Memory(loaded, loading_peak, _resident() - base, peak_bytes() - base, device, device_peak)


def _resident() -> int:
    gc.collect()
    return resident_bytes()
