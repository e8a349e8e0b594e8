"""Up to how many rows of input a kernel beats unpacking the weight in blocks: measured once in a process."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from hf_shrink.ops.grid import Grid, value_dtype
from hf_shrink.runtime.kernels.base import Kernel
from hf_shrink.runtime.kernels.blocks import blockwise_linear

# Above, weights are unpacked even where that is slower, so that long texts meet the very weights that are stored.
MOST = 128
# Accelerators' kernels compute with a weight that is rounded to bfloat16 once, like that of a bfloat16 model: for one
# whose scales are in bfloat16 nothing is to be gained by unpacking but time.
MOST_IN_BFLOAT16 = 2048
_TRIED = (1, 8, 32, 64, MOST)
_TRIED_IN_BFLOAT16 = (*_TRIED, 512, MOST_IN_BFLOAT16)
_LARGE = {True: 1 << 19, False: 1 << 21}  # values of a weight, on the CPU or not: below, calls cost more than products
# Rows and columns of what is tried, on the CPU or not, for a large weight or not.
_SIZES = {
    (True, False): (384, 512),
    (True, True): (1024, 1024),
    (False, False): (768, 1024),
    (False, True): (4096, 4096),
}
_TIMES = 5


def few_limit(kind: type[Kernel], values: int, dtype: torch.dtype, device: torch.device) -> int:
    """The most rows for the kernel; 0 where it never gains, or takes all.

    Args:
        kind: the kernel.
        values: elements of the weight.
        dtype: of inputs.
        device: of the weight.
    """
    if kind.always or dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return 0
    return _measured(kind, values >= _LARGE[device.type == "cpu"], dtype, device, torch.get_num_threads())


@cache
@torch.no_grad()
def _measured(kind: type[Kernel], large: bool, dtype: torch.dtype, device: torch.device, threads: int) -> int:
    on_cpu = device.type == "cpu"
    rows, columns = _SIZES[on_cpu, large]
    scheme = kind.example
    tried = _TRIED if on_cpu or dtype != torch.bfloat16 else _TRIED_IN_BFLOAT16
    values = torch.ones(rows, columns, device=device).to(value_dtype(scheme))
    scale = torch.ones(rows, scheme.scale_columns(columns), dtype=torch.bfloat16, device=device)
    kernel = kind.pack(values, Grid(scheme, scale), tried[-1])
    won, gain = 0, 0.0
    for count in tried:
        tokens = torch.ones(count, columns, dtype=dtype, device=device)
        direct, unpacked = _least(
            [lambda x=tokens: kernel.linear(x, None), lambda x=tokens: blockwise_linear(kernel, x, None)],  # type: ignore[misc]
            device,
        )
        if direct >= unpacked:
            lost = direct - unpacked
            return won and won + int((count - won) * gain / (gain + lost))
        won, gain = count, unpacked - direct
    return won


def _least(products: list[Callable[[], Tensor]], device: torch.device) -> list[float]:
    """Seconds of each, in turn: other work on the machine can only add to them."""
    for product in products:
        product()
    rounds = [[_seconds(product, device) for product in products] for _ in range(_TIMES)]
    return [min(times) for times in zip(*rounds, strict=True)]


def _seconds(product: Callable[[], Tensor], device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    product()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start
