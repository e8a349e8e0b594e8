"""What measuring costs over bare forward passes, and what dense copies save for a packed model.

    python evaluation.py --model DIR [--text held_out.txt] [--windows 40] [--packed-windows 8] [--output FILE.json]

Each batch is run bare and measured, one after the other, so that a busy machine slows both alike; CPU seconds count.
The bare passes' logits give a perplexity of their own, in float64, which the measured one is checked against.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import windows, write_results
from texts import write_plays

from hf_shrink import evaluate_model, shrink
from hf_shrink.checkpoint.inference import optimize_for_inference
from hf_shrink.evaluation import evaluate

LENGTH, AT_ONCE = 512, 8
W4 = {"steps": [{"quantize": {"method": "rtn", "group_size": 64}}], "evaluation": {"metrics": []}}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, help="default: Shakespeare's tragedies")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--packed-windows", type=int, default=8, help="0: the dense model only")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    with tempfile.TemporaryDirectory() as folder:
        text = given.text or write_plays(Path(folder) / "plays.txt")
        rows = windows(tokenizer, text, given.windows, LENGTH)
    evaluate_model(model, [{"input_ids": rows[:1, :8]}], metrics=["perplexity"])  # imports what it needs
    found: dict[str, Any] = {"dense": beside_bare_passes(model, rows)}
    print(found["dense"], flush=True)
    if given.packed_windows:
        shrink(model, W4, progress=False)
        optimize_for_inference(model)
        found["W4 in float32"] = with_and_without_copies(model, rows[: given.packed_windows])
        print(found["W4 in float32"], flush=True)
    protocol = {"length": LENGTH, "windows": given.windows, "packed_windows": given.packed_windows, "threads": 1}
    write_results(
        "evaluation", {"protocol": {**protocol, "model": Path(given.model).name}, "results": found}, given.output
    )


@torch.no_grad()
def beside_bare_passes(model: Any, rows: torch.Tensor) -> dict[str, float]:
    """CPU seconds of bare passes and of measuring, and the perplexity by either."""
    bare = measured = loss = their_loss = 0.0
    tokens = 0
    for batch in rows.split(AT_ONCE):
        for row in batch:
            seconds, outputs = timed(lambda row=row: model(input_ids=row[None], use_cache=False))
            bare += seconds
            logits = outputs.logits[0, :-1].double()
            loss += (logits.logsumexp(-1) - logits.gather(-1, row[1:, None])[:, 0]).sum().item()
        seconds, result = timed(
            lambda batch=batch: evaluate_model(model, [{"input_ids": batch}], metrics=["perplexity"])
        )
        measured += seconds
        their_loss += math.log(result["model"]["perplexity"]["value"]) * result["tokens"]
        tokens += result["tokens"]
    return {
        "bare_cpu_seconds": bare,
        "measured_cpu_seconds": measured,
        "ratio": measured / bare,
        "perplexity_plain": math.exp(loss / tokens),
        "perplexity": math.exp(their_loss / tokens),
        "tokens": rows.numel(),
    }


def with_and_without_copies(model: Any, rows: torch.Tensor) -> dict[str, float]:
    """CPU seconds of measuring a packed model, and what it says, with dense copies and without."""
    data, found, real = [{"input_ids": rows}], {}, evaluate.dense_copies
    none: Callable[..., Any] = lambda models, **_: real(models, 0)  # noqa: E731
    choices: Sequence[tuple[str, Callable[..., Any]]] = [("with", real), ("without", none)]
    for name, chosen in choices:
        evaluate.dense_copies = chosen
        seconds, result = timed(lambda: evaluate_model(model, data, metrics=["perplexity"]))
        found |= {f"{name}_cpu_seconds": seconds, f"{name}_perplexity": result["model"]["perplexity"]["value"]}
    evaluate.dense_copies = real
    return {**found, "ratio": found["with_cpu_seconds"] / found["without_cpu_seconds"], "tokens": rows.numel()}


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds and result of a call."""
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


if __name__ == "__main__":
    main()
