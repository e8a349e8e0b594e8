"""How much of what compression cost SmolLM2-135M comes back in 15 minutes on two cores: excess loss before and after.

    python scripts/bench/recovery.py --model DIR --data DIR --output recovery.json
    python scripts/bench/recovery.py ... --only depth20 --threads 1

Started from: 20% of the blocks' parameters pruned (whole blocks, the others refitted; or MLP channels), recovered by
LoRA and distillation, alone or with half as much of the texts' own next tokens beside it (-task); 3 and 2 bits by GPTQ
in groups of 64, recovered by training scales (-rate: at twice the usual rate). Learned from: text that the dense model
writes, and emma.txt. Held out: 40 x 512 tokens each of mansfieldpark.txt and prideprejudice.txt; the predictions'
divergence from the dense model is measured on the same tokens. What counts is everything after the model is compressed:
text, teacher, training, both measurements that decide. CPU seconds of all threads stand beside wall seconds: two cores
have 1,800 in 15 minutes.

Every variant runs in a process of its own. Results are written after each; one that the file has is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import about, run_fresh, stopwatch, windows, write_results

LENGTH = 512
LEARNED, HELD_OUT = "emma.txt", ("mansfieldpark.txt", "prideprejudice.txt")


def quantized(bits: int, **more: Any) -> dict[str, Any]:
    return {"quantize": {"method": "gptq", "scheme": f"W{bits}A16", "group_size": 64, **more}}


def pruned(what: str, method: str) -> dict[str, Any]:
    return {"prune": {"what": what, "method": method, "ratio": 0.2}}


# Steps as far as 1,800 CPU seconds go: SmolLM2 takes 4.6 for 512 tokens with its teacher, measured on a busy machine.
LORA = {"method": "lora", "rank": 32, "learning_rate": 1e-3, "tokens": 512, "steps": 320, "held_out": 0.03}
SCALES = {"method": "scales", "steps": 160, "samples": 160}
VARIANTS: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "depth20": (pruned("depth", "block_influence"), LORA),
    "depth20-task": (pruned("depth", "block_influence"), {**LORA, "task": 0.5}),
    "width20": (pruned("width", "obs"), LORA),
    "w3": (quantized(3), SCALES),
    "w2": (quantized(2, symmetric=False), SCALES),
    "w2-rate": (quantized(2, symmetric=False), {**SCALES, "steps": 190, "samples": 192, "learning_rate": 8e-3}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="float32 safetensors folder (scripts/fetch_demo_model.py makes one)")
    add("--data", type=Path, required=True, help=f"folder with {LEARNED} and {', '.join(HELD_OUT)}")
    add("--only", nargs="*", choices=VARIANTS, help="variants to run")
    add("--threads", type=int, default=2)
    add("--samples", type=int, default=32, help="windows that compression is calibrated on")
    add("--written", type=int, default=32, help="windows that the dense model writes")
    add("--read", type=int, default=352, help=f"windows of {LEARNED}")
    add("--held-out-samples", type=int, default=40)
    add("--minutes", type=float, default=15, help="after which training ends if not before; 0: by steps alone")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="options of recovery, JSON values")
    add("--output", type=Path)
    add("--job", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job is not None:
        print(json.dumps(measured(given, given.job)))
        return
    own = ("only", "output", "job", "data", "model")
    protocol = {key: value for key, value in vars(given).items() if key not in own}
    variants = json.loads(json.dumps(VARIANTS))  # as they will be read again
    results: dict[str, Any] = {}
    if given.output is not None and given.output.is_file():
        before = json.loads(given.output.read_text())
        same = before["protocol"] == protocol
        results = {n: r for n, r in before["results"].items() if same and before["variants"][n] == variants.get(n)}
    for name in given.only or VARIANTS:
        if name in results:
            continue
        results[name] = run_fresh([sys.executable, *sys.argv, "--job", name], given.threads)
        show(name, results[name])
        content = {"protocol": protocol, "variants": {n: variants[n] for n in results}, "results": results}
        write_results("recovery", content, given.output)


def show(name: str, result: Mapping[str, Any]) -> None:
    for text, figures in result["texts"].items():
        excess = f"excess loss {figures['before']:.3f} -> {figures['after']:.3f} ({figures['gone']:.0%} gone)"
        distance = f"divergence {figures['divergence_before']:.3f} -> {figures['divergence_after']:.3f}"
        print(f"{name} {text}: {excess}, {distance}")
    print(f"{name}: {result['recovery']['cpu_seconds']:.0f} CPU-s, {result['note']}", flush=True)


def measured(given: argparse.Namespace, name: str) -> dict[str, Any]:
    """One variant: compressed, measured, recovered and measured again."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hf_shrink
    from hf_shrink.calibration.data import calibration_batches
    from hf_shrink.recipe import CalibrationSpec

    torch.set_num_threads(given.threads)
    step, options = VARIANTS[name]
    options = {**options, **{key: json.loads(value) for key, _, value in (word.partition("=") for word in given.set)}}
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    dense, model = (AutoModelForCausalLM.from_pretrained(given.model) for _ in range(2))
    learned = windows(tokenizer, given.data / LEARNED, given.read, LENGTH)
    texts = {text: windows(tokenizer, given.data / text, given.held_out_samples, LENGTH) for text in HELD_OUT}
    batches = [{"input_ids": row[None]} for row in learned]
    with stopwatch() as compressing:
        hf_shrink.shrink(model, {"steps": [step]}, calibration=batches[: given.samples], progress=False)
    before = {text: figures(model, dense, rows) for text, rows in texts.items()}
    with stopwatch() as recovering:
        since = time.perf_counter()
        spec = CalibrationSpec(data="self", samples=max(1, given.written), length=LENGTH)
        written = calibration_batches(spec, model=dense, tokenizer=tokenizer, seed=1).batches if given.written else []
        written = [{"input_ids": row[None]} for batch in written for row in batch["input_ids"]]
        options = {"samples": len(written) + len(batches), "length": LENGTH, **options}
        if given.minutes:
            options["minutes"] = given.minutes - (time.perf_counter() - since) / 60
        found = hf_shrink.recover(model, teacher=dense, data=[*written, *batches], progress=False, **options)
    after = {text: figures(found.model, dense, rows) for text, rows in texts.items()}
    return {
        **{key: about()[key] for key in ("commit", "hardware")},
        "threads": given.threads,
        "step": step,
        "options": options,
        "compressing": compressing,
        "recovery": recovering,
        "steps": found.steps,
        "adopted": found.adopted,
        "held_out_loss": [found.before, found.after],
        "note": found.note,
        "texts": {
            text: {
                "dense_perplexity": before[text]["dense"],
                "before": before[text]["excess"],
                "after": after[text]["excess"],
                "gone": 1 - after[text]["excess"] / before[text]["excess"],
                "divergence_before": before[text]["divergence"],
                "divergence_after": after[text]["divergence"],
            }
            for text in texts
        },
    }


def figures(model: Any, dense: Any, rows: Any) -> dict[str, float]:
    """Excess loss and KL divergence from the dense model, in nats a predicted token."""
    import torch

    loss = own_loss = divergence = 0.0
    count = 0
    model.eval()
    with torch.no_grad():
        for row in rows:
            own, wanted = (m(row[None]).logits[0, :-1].float().log_softmax(-1) for m in (model, dense))
            own_loss -= own.gather(1, row[1:, None]).sum().item()
            loss -= wanted.gather(1, row[1:, None]).sum().item()
            divergence += (wanted.exp() * (wanted - own)).sum().item()
            count += len(row) - 1
    return {"dense": math.exp(loss / count), "excess": (own_loss - loss) / count, "divergence": divergence / count}


if __name__ == "__main__":
    main()
