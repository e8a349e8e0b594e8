"""Parts of `gpu.py`: single products on a CUDA GPU, how exact they are and how long they take."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_shrink.plan import Scheme
from hf_shrink.quantization.rtn import RTN
from hf_shrink.runtime import CompressedLinear
from hf_shrink.runtime.kernels.blocks import blockwise_linear

DEVICE = torch.device("cuda", 0)
SCHEMES = {
    "W4 g64": Scheme(4, True, "group", 64),
    "W4 g128": Scheme(4, True, "group", 128),
    "W8": Scheme(8, True, "channel", None),
    "W8A8": Scheme(8, True, "channel", None, "int", 8),
    "FP8": Scheme(8, True, "channel", None, "float"),
}
SHAPES = {"SmolLM2 gate": (1536, 576), "1B query": (2048, 2048), "1B gate": (8192, 2048), "1B down": (2048, 8192)}
STREAMED = 200 << 20  # bytes of copies that take turns: more than the caches hold
ROWS = (1, 16, 64, 256, 1024)


def packed(scheme: Scheme, rows: int, columns: int) -> CompressedLinear:
    weight = torch.randn(rows, columns, device=DEVICE) / columns**0.5
    found = RTN(search=False).solve(weight, scheme, None, scale_dtype=torch.bfloat16)
    return CompressedLinear.from_quantized(found, None)


def optimized(linear: CompressedLinear) -> CompressedLinear:
    linear.optimize()
    return linear


def kernels(run: object) -> dict[str, Any]:
    """Relative errors against float64, by scheme, shape and rows, through the kernel and through blocks."""
    found: dict[str, Any] = {}
    for name, scheme in SCHEMES.items():
        for shape, (rows, columns) in SHAPES.items():
            if columns % (scheme.group_size or 1):
                continue
            plain = packed(scheme, rows, columns)
            exact = plain.weight.double()
            fast = optimized(copy.deepcopy(plain))
            errors: dict[str, Any] = {"kernel": fast.kernel_note}
            for count in (1, 17, 300) if fast.kernel is not None else ():
                x = torch.randn(count, columns, device=DEVICE).bfloat16()
                wanted = x.double() @ exact.T
                for way, run_it in (("few", fast.kernel.few_rows), ("blocks", _blocks(fast))):
                    errors[f"{way} {count}"] = float((run_it(x).double() - wanted).norm() / wanted.norm())
            state, kept = plain.state_dict(), fast.state_dict()
            errors["same bits"] = all(
                torch.equal(state[n].view(torch.uint8), kept[n].view(torch.uint8)) for n in state if state[n].dim()
            )
            found[f"{name} {shape}"] = errors
    return found


def _blocks(linear: CompressedLinear) -> Callable[[Tensor], Tensor]:
    return lambda x: blockwise_linear(linear.kernel, x, None)  # type: ignore[arg-type]


def calls(run: object) -> dict[str, Any]:
    """Microseconds of one product in a replayed graph, weights taken in turn from more memory than caches hold."""
    found: dict[str, Any] = {}
    for shape, (rows, columns) in SHAPES.items():
        copies = max(2, min(64, STREAMED // (rows * columns)))
        ways: dict[str, list[Callable[[Tensor], Tensor]]] = {
            "bfloat16": [_dense_product(rows, columns) for _ in range(copies)]
        }
        for name, scheme in SCHEMES.items():
            if columns % (scheme.group_size or 1):
                continue
            linears = [optimized(packed(scheme, rows, columns)) for _ in range(copies)]
            if linears[0].kernel is None:
                continue
            ways[name] = [linear.kernel.few_rows for linear in linears]  # type: ignore[union-attr]
            if name != "W8A8":
                ways[f"{name} by blocks"] = [_blocks(linear) for linear in linears]
        octets = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=DEVICE)
        scale = torch.rand(rows, device=DEVICE).bfloat16()
        ways["_weight_int8pack_mm"] = [lambda x: torch._weight_int8pack_mm(x, octets, scale)] * 2  # noqa: B023
        for padded in (17, 24, 32):
            integers = torch.randint(-127, 128, (padded, columns), dtype=torch.int8, device=DEVICE)
            found[f"{shape}, _int_mm of {padded}"] = _microseconds(
                [lambda x: torch._int_mm(x, octets.T)] * 20,  # noqa: B023
                integers,
            )
        for count in ROWS:
            x = torch.randn(count, columns, device=DEVICE).bfloat16()
            found[f"{shape}, {count} rows"] = {name: _microseconds(products, x) for name, products in ways.items()}
    return found


def _dense_product(rows: int, columns: int) -> Callable[[Tensor], Tensor]:
    weight = torch.randn(rows, columns, device=DEVICE).bfloat16()
    return lambda x: F.linear(x, weight)


@torch.no_grad()
def _microseconds(products: list[Callable[[Tensor], Tensor]], x: Tensor) -> float | str:
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for product in products[:2]:
                product(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for product in products:
                product(x)
        times = []
        for _ in range(7):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000 / len(products))
        return round(sorted(times)[len(times) // 2], 1)
    except RuntimeError as error:
        torch.cuda.synchronize()
        return str(error).splitlines()[0]
