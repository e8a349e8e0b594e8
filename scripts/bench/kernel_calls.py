"""What calls of torch's CPU kernels cost in a decode step: apart or fused, the output head, attention of one token.

    python scripts/bench/kernel_calls.py [--threads N] [--rounds 9] [--json FILE]

Weights are streamed from memory, alternatives take turns, and minima are kept, in microseconds: of the process's CPU
time with one thread, of the clock with more.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

RESULTS = Path(__file__).parent / "results" / "kernel_calls.json"
GROUP = 64
STREAMED = 120 << 20  # bytes: more than caches hold
SHAPES = {
    "SmolLM2-135M query, key, value": (576, (576, 192, 192)),
    "SmolLM2-135M gate, up": (576, (1536, 1536)),
    "1B query, key, value": (2048, (2048, 512, 512)),
    "1B gate, up": (2048, (8192, 8192)),
}
HEADS = {"SmolLM2-135M": (49152, 576), "1B": (32000, 2048)}
ATTENTIONS = {"SmolLM2-135M": (9, 3), "1B": (32, 8), "as many KV groups": (12, 12)}
Packed = tuple[torch.Tensor, torch.Tensor]


def packed(rows: int, columns: int) -> Packed:
    values = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
    scales = (torch.rand(columns // GROUP, rows, 2) / 100).to(torch.bfloat16)
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1), scales


def multiply(x: torch.Tensor, weight: Packed) -> torch.Tensor:
    return torch._weight_int4pack_mm_for_cpu(x, weight[0], GROUP, weight[1])


def fastest(runs: dict[str, Callable[[], object]], rounds: int, inner: int) -> dict[str, float]:
    """Microseconds a call, the least of `rounds`."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            start = clock()
            for _ in range(inner):
                run()
            best[name] = min(best[name], (clock() - start) / inner * 1e6)
    return {name: round(value, 1) for name, value in best.items()}


def fusing(columns: int, sizes: tuple[int, ...], rounds: int) -> dict[str, dict[str, float]]:
    """Matrices that read the same input, one call each and one call for all."""
    count = max(6, STREAMED // (sum(sizes) * columns // 2))
    apart = [[packed(size, columns) for size in sizes] for _ in range(count)]
    fused = [packed(sum(sizes), columns) for _ in range(count)]
    found = {}
    for rows in (1, 4):
        x = torch.randn(rows, columns).to(torch.bfloat16)

        def one_each(x: torch.Tensor = x) -> None:
            for weights in apart:
                for weight in weights:
                    multiply(x, weight)

        def one_for_all(x: torch.Tensor = x) -> None:
            for weight in fused:
                multiply(x, weight).split(sizes, 1)

        best = fastest({"apart": one_each, "fused": one_for_all}, rounds, 1)
        found[f"{rows} rows"] = {name: round(value / count, 1) for name, value in best.items()}
    return found


def head(rows: int, columns: int, rounds: int) -> dict[str, float]:
    x, dense = torch.randn(1, columns).to(torch.bfloat16), torch.randn(rows, columns).to(torch.bfloat16)
    octets, scale = torch.randint(-127, 128, (rows, columns), dtype=torch.int8), torch.rand(rows).to(torch.bfloat16)
    nibbles, planes = packed(rows, columns), packed(rows, 2 * columns)
    runs = {
        "bfloat16": lambda: F.linear(x, dense),
        "int8": lambda: torch._weight_int8pack_mm(x, octets, scale),
        "int8 as two int4": lambda: multiply(torch.cat([x, x], 1), planes),
        "int4": lambda: multiply(x, nibbles),
    }
    return fastest(runs, rounds, 3)


def attention(heads: int, groups: int, keys: int, rounds: int) -> dict[str, float]:
    """bfloat16, head size 64, one token: as transformers does it, and as `runtime/attention.py`."""
    query = torch.randn(1, heads, 1, 64).to(torch.bfloat16)
    key, value = (torch.randn(1, groups, keys, 64).to(torch.bfloat16) for _ in range(2))
    share = heads // groups
    rows = query.repeat(1, 1, 2, 1) if share == 1 else query.reshape(1, groups, share, 64)
    runs = {
        "head by head": lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=True),
        "group by group": lambda: F.scaled_dot_product_attention(rows, key, value),
    }
    return fastest(runs, rounds, 10)


def measured(rounds: int) -> dict[str, object]:
    return {
        "torch": torch.__version__,
        "fusing": {name: fusing(*shape, rounds) for name, shape in SHAPES.items()},
        "head": {name: head(*shape, rounds) for name, shape in HEADS.items()},
        "attention": {
            f"{name}, {keys} keys": attention(*counts, keys, rounds)
            for name, counts in ATTENTIONS.items()
            for keys in (128, 512)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    everything = json.loads(options.json.read_text()) if options.json.exists() else {}
    everything[f"{options.threads} threads"] = measured(options.rounds)
    options.json.write_text(json.dumps(everything, indent=1) + "\n")
    print(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
