"""What the benchmarks share: protocol pieces, timing, peak memory, and JSON results with versions and hardware.

The module imports torch only where it is needed: a parent that starts the measured processes must itself stay small,
because Linux counts its resident memory as the first peak of a child.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("hf_shrink", "torch", "transformers", "compressed-tensors", "datasets", "accelerate", "numpy")


def library(name: str) -> ModuleType:
    """The file hf_shrink/NAME.py alone, without the package: for those of its files that import nothing of it.

    So the same code measures here, where other tools are installed and hf_shrink is not, and in processes that stay
    small.
    """
    alone = f"hf_shrink_file_{name.replace('/', '_')}"
    if alone not in sys.modules:
        spec = importlib.util.spec_from_file_location(alone, ROOT / "hf_shrink" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[alone] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[alone]


def today() -> str:
    return time.strftime("%Y-%m-%d")


def about() -> dict[str, Any]:
    """Date, commit, versions and hardware of what is measured in this environment."""
    return {
        "date": today(),
        "commit": git_commit(),
        "versions": versions(),
        "hardware": library("evaluation/machine").hardware(),
    }


def versions() -> dict[str, str]:
    """Installed versions of what decides a result, and of Python."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_commit() -> str:
    """The commit that was measured, with "+" when the working tree differs from it outside the results folder."""
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode:
        return "unknown"
    status = ["git", "status", "--porcelain", "--", ".", ":!scripts/bench/results"]
    dirty = subprocess.run(status, cwd=ROOT, capture_output=True, text=True).stdout
    return head.stdout.strip() + ("+" if dirty.strip() else "")


@contextmanager
def stopwatch() -> Iterator[dict[str, float]]:
    """`with stopwatch() as t: ...` leaves wall and process CPU seconds in t."""
    times: dict[str, float] = {}
    wall, cpu = time.perf_counter(), time.process_time()
    yield times
    times["seconds"] = round(time.perf_counter() - wall, 2)
    times["cpu_seconds"] = round(time.process_time() - cpu, 2)


def peak_memory_mb() -> float:
    """The most memory (10^6 bytes) that was resident in this process so far."""
    return round(library("evaluation/machine").peak_bytes() / 1e6, 1)


def folder_bytes(folder: Path) -> int:
    """Bytes of the weights in a checkpoint folder and below it."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def windows(tokenizer: Any, path: Path, count: int, length: int) -> torch.Tensor:
    """The first `count` windows of `length` consecutive tokens of a text file, int64 (count, length).

    No special tokens; the same cut as the peers' runner. Raises ValueError where the text is too short.
    """
    ids = tokenizer(path.read_text(), return_tensors="pt", add_special_tokens=False).input_ids[0]
    if ids.numel() < count * length:
        raise ValueError(f"{path} has {ids.numel()} tokens, {count} x {length} are needed")
    rows: torch.Tensor = ids[: count * length].view(count, length)
    return rows


def perplexity(model: Any, rows: torch.Tensor) -> float:
    """exp of the mean loss over all predicted tokens (length - 1 of each row), summed before it is divided."""
    import torch

    loss, tokens = 0.0, 0
    with torch.no_grad():
        for row in rows.to(model.device):
            logits = model(row[None]).logits[0, :-1].float()
            loss += torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").item()
            tokens += row.numel() - 1
    return math.exp(loss / tokens)


def run_fresh(command: Sequence[str], threads: int) -> dict[str, Any]:
    """Run a command in a process of its own and read the JSON line that it prints last.

    Raises RuntimeError with the end of its output when it fails or prints none.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUTF8": "1",  # texts are read without naming an encoding
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(list(command), env=environment, stdout=subprocess.PIPE, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def write_results(name: str, content: dict[str, Any], output: Path | None = None) -> Path:
    """Write `content` with date, commit, versions and hardware to results/NAME.json or `output`; returns the path."""
    path = output or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about(), **content}, indent=1) + "\n")
    return path
