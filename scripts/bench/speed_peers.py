"""One peer's speed in a process of its own: `python speed_peers.py JOB`, JSON in and out.

Runs where the peer is installed and hf_shrink is not. A job: tool, folder, group, compiled, threads, prompt, new,
prefill, repeats. Time is taken as `hf-shrink bench` does, by the same files of the library.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import torch
from common import library
from transformers import AutoModelForCausalLM

Loader = Callable[[str, int], Any]


def load(folder: str, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.bfloat16, **options}).eval()


def inside_blocks(module: torch.nn.Module, path: str) -> bool:
    return isinstance(module, torch.nn.Linear) and "lm_head" not in path


def torchao_int4(folder: str, group: int) -> Any:
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    model = load(folder)
    quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=group), filter_fn=inside_blocks)
    return model


def torchao_int8(folder: str, group: int) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = load(folder)
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=inside_blocks)
    return model


def bitsandbytes_nf4(folder: str, group: int) -> Any:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return load(folder, quantization_config=config)


def quanto(bits: int) -> Loader:
    def make(folder: str, group: int) -> Any:
        from optimum.quanto import freeze, qint4, qint8, quantize

        model = load(folder, dtype=torch.float32)  # faster here than in bfloat16
        quantize(model, weights=qint4 if bits == 4 else qint8, exclude="lm_head")
        freeze(model)
        return model

    return make


def stock(folder: str, group: int) -> Any:
    """A compressed-tensors checkpoint in transformers as it is."""
    return load(folder)


# Imported before memory is counted: what a process has without the model.
IMPORTS = {
    "torchao": ("torchao.quantization", "torchao.prototype.quantization.int4.inference_workflow"),
    "bitsandbytes": ("bitsandbytes",),
    "quanto": ("optimum.quanto",),
    "compressed": ("compressed_tensors",),
}
MODELLING = ("transformers.models.llama.modeling_llama", "transformers.generation.utils")
LOADERS: dict[str, Loader] = {
    "torchao-int4": torchao_int4,
    "torchao-int8": torchao_int8,
    "bitsandbytes-nf4": bitsandbytes_nf4,
    "quanto-int8": quanto(8),
    "quanto-int4": quanto(4),
    "compressed-tensors": stock,
}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Load, run forward once, warm up, and time."""
    torch.set_num_threads(job["threads"])
    machine, timing = library("evaluation/machine"), library("evaluation/timing")
    greedy_config = library("evaluation/greedy").greedy_config

    def resident() -> int:
        gc.collect()
        found: int = machine.resident_bytes()
        return found

    for name in (*MODELLING, *IMPORTS[job["tool"].partition("-")[0]]):
        importlib.import_module(name)
    torch.ones(8, 8) @ torch.ones(8, 8)
    base = resident()
    model = LOADERS[job["tool"].removesuffix("-compiled")](job["folder"], job["group"])
    loaded, loading_peak = resident() - base, machine.peak_bytes() - base
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for length in (job["prompt"], job["prefill"]):
        ids = torch.randint(0, model.config.vocab_size, (1, length), generator=generator)
        inputs.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    with torch.no_grad():
        model(**inputs[0])
    used, peak = resident() - base, machine.peak_bytes() - base

    configs = [greedy_config(model, new, exactly=True) for new in (job["new"], 1)]
    if job["compiled"]:
        configs = [timing.compiled(config) for config in configs]

    def once() -> tuple[Any, Any]:
        decode, prefill = (timing.time_generation(model, i, c) for i, c in zip(inputs, configs, strict=True))
        return decode, prefill

    once()
    if job["compiled"] and not timing.was_compiled(model):
        raise RuntimeError(f"transformers does not compile {job['tool']}")
    runs = timing.in_turn({"model": once}, job["repeats"])["model"]
    amounts = {"decode": job["new"] - 1, "first token": job["prompt"], "prefill": job["prefill"]}
    spent = {
        "decode": [decode.rest for decode, _ in runs],
        "first token": [decode.first for decode, _ in runs],
        "prefill": [prefill.first for _, prefill in runs],
    }
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "weight_bytes": None,
        "timings": {
            task: {
                "unit": "token",
                "amount": amount,
                "seconds": [s.wall for s in spent[task]],
                "cpu_seconds": [s.cpu for s in spent[task]],
            }
            for task, amount in amounts.items()
        },
        "memory": {"loaded": loaded, "loading_peak": loading_peak, "used": used, "peak": peak},
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
