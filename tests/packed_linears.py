"""Packed Linears of all schemes, and what their products are held against."""

from __future__ import annotations

import copy

import torch
from torch import nn

from hf_shrink.plan import Scheme
from hf_shrink.quantization.rtn import RTN
from hf_shrink.runtime import CompressedLinear

SCHEMES = [
    Scheme(4, True, "group", 32),
    Scheme(4, False, "group", 64),
    Scheme(4, True, "group", 128),
    Scheme(4, False, "group", 512),
    Scheme(4, True, "group", 96),
    Scheme(4, False, "channel", None),
    Scheme(4, True, "tensor", None),
    Scheme(3, True, "group", 64),
    Scheme(2, False, "group", 32),
    Scheme(8, True, "channel", None),
    Scheme(6, True, "tensor", None),
    Scheme(8, False, "channel", None),
    Scheme(8, True, "group", 128),
    Scheme(5, False, "group", 32),
]


def linear_of(scheme: Scheme, rows: int = 80, columns: int = 1536, dtype=torch.float32, bias=True) -> CompressedLinear:
    result = RTN().solve(torch.randn(rows, columns) + 0.1, scheme, None, scale_dtype=dtype)
    return CompressedLinear.from_quantized(result, nn.Parameter(torch.randn(rows, dtype=dtype)) if bias else None)


def optimized(scheme: Scheme, *args, device="cpu", **kwargs) -> tuple[CompressedLinear, CompressedLinear]:
    """A Linear as a checkpoint holds it, on the CPU, and its copy on a device, optimized there."""
    plain = linear_of(scheme, *args, **kwargs)
    fast = copy.deepcopy(plain).to(device)
    fast.optimize()
    assert fast.kernel is not None, fast.kernel_note
    return plain, fast


def expected(plain: CompressedLinear, input: torch.Tensor) -> torch.Tensor:
    """The product in float64."""
    bias = 0 if plain.bias is None else plain.bias.detach().double()
    return input.double() @ plain.weight.double().T + bias


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Within what rounding inputs, scales and outputs to bfloat16 costs."""
    assert found.shape == wanted.shape
    assert (found.cpu().double() - wanted).norm() <= 0.006 * wanted.norm() + 1e-9
