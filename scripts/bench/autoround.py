"""AutoRound, run by the peer's own Python with the calls of the peers' runner, and measured from dense weights.

    ~/.peers/autoround/bin/python scripts/bench/autoround.py JOB

What AutoRound saves it loads as float16 with a reference product that takes half a minute for 512 tokens on a CPU, ten
times as long as the rounding of a block. Here the loaded weights are asked for once, and perplexity is that of the
float32 model with them. Seconds and peak memory end when the checkpoint is written, as in the runner.

A job: model (folder), calibration and held_out (text files), samples, held_out_samples, length, bits, group, symmetric,
iterations, threads, output (folder); or, to measure a checkpoint that is there, `saved` in place of what makes one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import peak_memory_mb, perplexity, stopwatch, windows


def measure(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(job["threads"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    held_out = {
        Path(path).stem: windows(tokenizer, Path(path), job["held_out_samples"], job["length"])
        for path in job["held_out"]
    }
    made = {"threads": torch.get_num_threads()}
    saved = job.get("saved")
    if saved is None:
        rows = windows(tokenizer, Path(job["calibration"]), job["samples"], job["length"])
        made |= quantized(job, tokenizer, rows)
        saved = next(Path(job["output"]).rglob("config.json")).parent
    model = dense(job["model"], saved)
    return {**made, "perplexity": {name: perplexity(model, rows) for name, rows in held_out.items()}}


def quantized(job: dict[str, Any], tokenizer: Any, rows: Any) -> dict[str, Any]:
    """Run AutoRound into job["output"]."""
    import torch

    with stopwatch() as times:
        from auto_round import AutoRound
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
        batches = [{"input_ids": r[None], "attention_mask": torch.ones(1, len(r), dtype=torch.long)} for r in rows]
        rounding = AutoRound(
            model,
            tokenizer,
            scheme="W4A16",
            bits=job["bits"],
            group_size=job["group"],
            sym=job["symmetric"],
            iters=job["iterations"],
            seqlen=job["length"],
            nsamples=len(rows),
            batch_size=4,
            dataset=torch.utils.data.DataLoader(batches, batch_size=1, collate_fn=lambda batch: batch[0]),
            device_map="cpu",
        )
        rounding.quantize_and_save(job["output"], format="auto_round")
    return {"seconds_with_loading": times["seconds"], "peak_mb": peak_memory_mb()}


def dense(source: str, saved: Path | str) -> Any:
    """The float32 model with the weights that a checkpoint of AutoRound stands for."""
    import torch
    from transformers import AutoModelForCausalLM

    packed = AutoModelForCausalLM.from_pretrained(saved, device_map="cpu")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        for path, module in packed.named_modules():
            if hasattr(module, "qweight"):
                linear = model.get_submodule(path)
                found = module(torch.eye(linear.in_features)).T
                linear.weight.copy_(found if linear.bias is None else found - linear.bias[:, None])
    return model


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
