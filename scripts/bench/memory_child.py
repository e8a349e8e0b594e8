"""The processes of memory.py: make a checkpoint, or shrink one and print the peak."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 64,
    "vocab_size": 32000,
}
BYTES = 4  # of a weight


def block_bytes() -> int:
    """Of one block's matrices."""
    hidden, middle = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    return BYTES * (4 * hidden**2 + 3 * hidden * middle)


def outside_bytes() -> int:
    """Of embedding and head."""
    return BYTES * 2 * SHAPE["hidden_size"] * SHAPE["vocab_size"]


def make(folder: Path, blocks: int) -> None:
    """A checkpoint of random weights, one tensor in memory at a time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_shrink.residence import write_tensors

    config = LlamaConfig(
        **SHAPE,
        num_hidden_layers=blocks,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(config).state_dict()
    draw = torch.Generator().manual_seed(0)

    def values(name: str) -> torch.Tensor:
        shape = skeleton[name].shape
        return torch.ones(shape) if len(shape) == 1 else torch.empty(shape).normal_(std=0.02, generator=draw)

    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", skeleton, {"format": "pt"}, read=values)
    config.save_pretrained(folder)


def tokens(samples: int, length: int) -> list[dict[str, Any]]:
    """One sample a batch."""
    import torch

    draw = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(3, SHAPE["vocab_size"], (1, length), generator=draw)} for _ in range(samples)]


def shrink(given: dict[str, Any]) -> dict[str, Any]:
    if given["limit"] is not None:
        confine(int(given["limit"]))
    from hf_shrink.checkpoint.source import load_source_model, open_source
    from hf_shrink.pipeline import shrink, shrink_checkpoint
    from hf_shrink.residence import bytes_of, peak_memory

    recipe = {"steps": [{"quantize": {"scheme": "W4A16", "method": given["method"]}}], "evaluation": {"metrics": []}}
    data = tokens(given["samples"], given["length"])
    imported = peak_memory()
    wall, cpu = time.perf_counter(), time.process_time()
    if given["kind"] == "streamed":
        memory = given["max_memory"]
        shrink_checkpoint(given["source"], given["output"], recipe, calibration=data, max_memory=memory, progress=False)
    else:
        model = shrink(load_source_model(open_source(given["source"])), recipe, calibration=data, progress=False)
        model.save_pretrained(given["output"])
    return {
        "peak_mb": round(peak_memory() / 1e6, 1),
        "imported_mb": round(imported / 1e6, 1),
        "max_memory_mb": bytes_of(given["max_memory"]) / 1e6,
        "seconds": round(time.perf_counter() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "output_mb": round(sum(f.stat().st_size for f in Path(given["output"]).glob("*.safetensors")) / 1e6, 1),
        "peak_virtual_mb": round(virtual() / 1e6, 1),
    }


def confine(limit: int) -> None:
    """Give this process so many bytes of memory by a control group: above it the kernel kills it. Needs root.

    No limit of address space, which counts what is mapped and was never read.
    """
    for root, name in (("memory", "memory.limit_in_bytes"), ("", "memory.max")):  # of version 1 and 2
        group = Path("/sys/fs/cgroup", root, "hf_shrink_bench")
        group.mkdir(exist_ok=True)
        if (group / name).exists():
            (group / name).write_text(str(limit))
            (group / "cgroup.procs").write_text(str(os.getpid()))
            return
        group.rmdir()
    raise SystemExit("there is no control group for memory that this process may make; leave --limit out")


def virtual() -> int:
    """The most address space that this process has had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmPeak:")))


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]), int(sys.argv[3]))
        print("{}")
    else:
        print(json.dumps(shrink(json.loads(sys.argv[2]))))
