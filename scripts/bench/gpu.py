"""What a CUDA GPU gives, in one run of under four minutes: kernels, generation, and compression itself.

    python scripts/bench/gpu.py --json FILE [--smollm2 FOLDER] [--seconds 230] [--parts kernels,calls,...]

Parts run in the order of PARTS. One that fails leaves its traceback in the file and the next goes on; one for which no
time is left is named as left out. The file is written anew after every part.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from common import about
from gpu_products import DEVICE, SCHEMES, calls, kernels, optimized, packed
from speed_models import LLAMA_1B
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_shrink import kernel_summary, optimize_for_inference, shrink, shrink_checkpoint
from hf_shrink.evaluation.speed import Workload, measure_speed
from hf_shrink.residence import Residence
from hf_shrink.runtime.int8 import multiplies_int8
from hf_shrink.runtime.kernels.crossover import few_limit
from hf_shrink.runtime.kernels.octets import multiplies_float8

CALIBRATION = (128, 512, 8)  # sequences, tokens, sequences a batch
RECIPES: dict[str, dict[str, Any]] = {
    "W4": {"scheme": "W4A16", "overrides": {"lm_head": {"scheme": "W8A16", "strategy": "channel"}}},
    "W8": {"scheme": "W8A16", "strategy": "channel"},
    "W8A8": {"scheme": "W8A8"},
    "FP8": {"scheme": "FP8A16"},
}
GROUPS = {"SmolLM2-135M": 64, "1B": 128}


@dataclass
class Run:
    """One run of the script: what is found so far, when it ends, and the models that several parts look at."""

    path: Path
    smollm2: Path | None
    ends: float
    found: dict[str, Any] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def left(self) -> float:
        return self.ends - time.monotonic()

    def write(self) -> None:
        self.path.write_text(json.dumps(self.found, indent=1) + "\n")

    def variants(self, name: str) -> dict[str, Any]:
        """A model dense in bfloat16, and compressed by rounding to nearest in every way."""
        if name not in self.models:
            dense = self._dense(name)
            made = {"dense": dense}
            for kind, quantize in RECIPES.items():
                step = {"method": "rtn", "search": False, **quantize}
                if kind == "W4":  # the others have one scale a row
                    step["group_size"] = GROUPS[name]
                recipe = {"portable": False, "steps": [{"quantize": step}]}
                made[kind] = shrink(copy.deepcopy(dense), recipe, progress=False)
            self.models[name] = made
        return self.models[name]

    def _dense(self, name: str) -> Any:
        if name == "1B":
            return random_1b()
        if self.smollm2 is None:
            raise FileNotFoundError("give --smollm2 FOLDER")
        loaded: Any = AutoModelForCausalLM.from_pretrained(self.smollm2, dtype=torch.bfloat16)
        return loaded.to(DEVICE).eval()


def random_1b(blocks: int = LLAMA_1B["num_hidden_layers"]) -> Any:  # type: ignore[assignment]
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(LlamaConfig(**{**LLAMA_1B, "num_hidden_layers": blocks}))
    return model.to(torch.bfloat16).eval()


def host(run: Run) -> dict[str, Any]:
    """The machine, what torch can do on it, and where kernels stop to gain."""
    free, total = torch.cuda.mem_get_info()
    limits = {
        name: {str(dtype): few_limit(kind, 1 << 24, dtype, DEVICE) for dtype in (torch.bfloat16, torch.float32)}
        | {"small": few_limit(kind, 1 << 19, torch.bfloat16, DEVICE)}
        for name, scheme in SCHEMES.items()
        if (kind := type(optimized(packed(scheme, 512, 512)).kernel)) is not type(None)
    }
    return {
        **about(),
        "gpu": torch.cuda.get_device_name(DEVICE),
        "memory": [free, total],
        "cuda": torch.version.cuda,
        "float8 product": multiplies_float8(DEVICE),
        "int8 product": multiplies_int8(DEVICE),
        "rows up to which kernels multiply": limits,
    }


def eager(name: str) -> Callable[[Run], dict[str, Any]]:
    return lambda run: _speeds(run.variants(name), Workload(64, 48, 512, repeats=3))


def compiled(name: str, kinds: tuple[str, ...]) -> Callable[[Run], dict[str, Any]]:
    """Decode steps through torch.compile with CUDA graphs, one model after the other, as long as there is time."""

    def measure(run: Run) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for kind in kinds:
            if run.left < 45:
                found[kind] = "left out: no time"
                continue
            since = time.monotonic()
            torch.compiler.reset()
            model = run.variants(name)[kind]
            try:
                found[kind] = _speeds({kind: model}, Workload(64, 128, 0, repeats=3), {kind})[kind]
            except Exception:
                found[kind] = traceback.format_exc()
            found[f"{kind}, seconds in all"] = round(time.monotonic() - since, 1)
        return found

    return measure


def _speeds(models: dict[str, Any], workload: Workload, through: set[str] | None = None) -> dict[str, Any]:
    """Tokens a second, the median of the runs, by model and task; and what the first calls took of memory."""
    timings = measure_speed(models, workload, compiled=through or set())
    found: dict[str, Any] = {}
    for name, tasks in timings.items():
        found[name] = {
            task: {"per_second": round(t.per_second.median, 1), "milliseconds": round(t.milliseconds.median, 3)}
            for task, t in tasks.items()
        }
        found[name]["bytes"] = sum(t.nbytes for t in _unique(models[name]))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            models[name](input_ids=torch.ones(1, 512, dtype=torch.long, device=DEVICE), use_cache=False)
        found[name]["above that for 512 tokens"] = torch.cuda.max_memory_allocated() - before
    return found


def _unique(model: nn.Module) -> Iterator[Tensor]:
    seen: set[int] = set()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            yield tensor


def summary(run: Run) -> dict[str, Any]:
    """What multiplies the models' weights."""
    return {
        name: {
            kind: {note: len(paths) for note, paths in kernel_summary(model).items()}
            for kind, model in models.items()
            if kind != "dense"
        }
        for name, models in run.models.items()
    }


def compression(blocks: int) -> Callable[[Run], dict[str, Any]]:
    """Seconds of `shrink` on the 1B model, or on some blocks of its shape, by what they were spent on."""

    def measure(run: Run) -> dict[str, Any]:
        if blocks > 4:
            known = run.found.get("shrink, 4 blocks of 1B", {}).get("seconds in all", 60)
            if run.left < 4 * known + 15:
                return {"left out": "no time"}
        run.models.clear()
        gc.collect()
        torch.cuda.empty_cache()
        model = random_1b(blocks)
        sequences, length, size = CALIBRATION
        ids = torch.randint(0, LLAMA_1B["vocab_size"], (sequences, length))  # type: ignore[call-overload]
        batches = [{"input_ids": part} for part in ids.split(size)]
        recipe = {"steps": [{"quantize": {"effort": "balanced", "scheme": "W4A16", "group_size": 128}}]}
        torch.cuda.reset_peak_memory_stats()
        since = time.monotonic()
        shrink(model, recipe, calibration=batches, progress=False, optimize=False)
        torch.cuda.synchronize()
        report = model.shrink_report
        found = {
            "seconds in all": round(time.monotonic() - since, 1),
            "by part": {part: round(seconds, 1) for part, seconds in report.seconds.items()},
            "peak bytes": torch.cuda.max_memory_allocated(),
            "block errors": [round(error, 5) for error in report.block_errors.values()],
        }
        optimize_for_inference(model)
        return found

    return measure


def from_folder(run: Run) -> dict[str, Any]:
    """`shrink_checkpoint` on 4 blocks of the 1B model's shape: whole on the GPU, and block by block as if it did not
    fit. Same weights, seconds and peak memory of the GPU."""
    sequences, length, size = CALIBRATION
    ids = torch.randint(0, LLAMA_1B["vocab_size"], (sequences // 4, length))  # type: ignore[call-overload]
    batches = [{"input_ids": part} for part in ids.split(size)]
    quantize = {"method": "gptq", "scheme": "W4A16", "group_size": 128, "damping": 0.01}
    recipe = {"steps": [{"quantize": quantize}], "evaluation": {"metrics": []}}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        random_1b(4).cpu().save_pretrained(source)
        for name, free in (("whole", None), ("block by block", 0)):
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            since = time.monotonic()
            with ExitStack() as stack:
                if free is not None:
                    stack.enter_context(mock.patch.object(Residence, "needed_to_visit", lambda self: 0))
                    stack.enter_context(mock.patch("hf_shrink.checkpoint.device.free_on", return_value=free))
                shrink_checkpoint(
                    source, Path(folder) / name, recipe, calibration=batches, progress=False, device=str(DEVICE)
                )
            seconds, peak = round(time.monotonic() - since, 1), torch.cuda.max_memory_allocated()
            found[name] = {"seconds": seconds, "peak bytes": peak}
        one, other = ((Path(folder) / name / "model.safetensors").read_bytes() for name in found)
    return {**found, "same bytes": one == other}


PARTS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "host": host,
    "kernels": kernels,
    "shrink, 4 blocks of 1B": compression(4),
    "calls": calls,
    "1B, eager": eager("1B"),
    "1B, compiled": compiled("1B", ("dense", "W4", "FP8", "W8A8", "W8")),
    "SmolLM2-135M, eager": eager("SmolLM2-135M"),
    "SmolLM2-135M, compiled": compiled("SmolLM2-135M", ("dense", "W4")),
    "summary": summary,
    "shrink, 1B": compression(16),
    "from a folder, 4 blocks of 1B": from_folder,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--smollm2", type=Path)
    parser.add_argument("--seconds", type=float, default=230)
    parser.add_argument("--parts", help="numbers in the order of PARTS, such as 0,1,4; all by default")
    options = parser.parse_args()
    run = Run(options.json, options.smollm2, time.monotonic() + options.seconds)
    names = list(PARTS)
    for name in names if options.parts is None else [names[int(n)] for n in options.parts.split(",")]:
        since = time.monotonic()
        try:
            run.found[name] = PARTS[name](run) if run.left > 10 else {"left out": "no time"}
        except Exception:
            run.found[name] = {"failed": traceback.format_exc()}
        print(f"{name}: {time.monotonic() - since:.1f} s", file=sys.stderr, flush=True)
        run.found.setdefault("seconds", {})[name] = round(time.monotonic() - since, 1)
        run.write()
    print(json.dumps(run.found, indent=1))


if __name__ == "__main__":
    main()
