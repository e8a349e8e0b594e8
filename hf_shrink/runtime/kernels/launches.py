"""Whether Triton works on a device: found by trying, since it wants a compiler when it runs."""

from __future__ import annotations

import subprocess
from functools import cache
from types import ModuleType
from typing import Literal

import torch
from torch.utils._triton import has_triton

from hf_shrink.ops.grid import FLOAT8
from hf_shrink.runtime.kernels import tiles


@cache
def fused_for(device: torch.device, what: Literal["tiles", "octets"]) -> ModuleType | None:
    """The module `fused` where its functions for weights of that kind run and are right; None elsewhere.

    Products are the same without it.
    """
    if device.type != "cuda" or not has_triton():
        return None
    from hf_shrink.runtime.kernels import fused

    try:
        with torch.cuda.device(device):
            return fused if (_tiles if what == "tiles" else _octets)(fused, device) else None
    except (RuntimeError, OSError, subprocess.CalledProcessError, fused.Failed):
        return None


def _tiles(fused: ModuleType, device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(16, (16, 96), generator=generator, dtype=torch.uint8).to(device)
    scales = torch.randn(3, 24, 2, generator=generator).bfloat16().to(device)
    scale, zero = scales[:, :16].float().repeat_interleave(32, 0).unbind(-1)
    wanted = ((values.float().T - 8) * scale + zero).bfloat16()
    found = fused.unpack_tiles(tiles.pack_tiles(values), scales[:, :16], 16, 32, 1, torch.bfloat16)
    return torch.allclose(found.T.float(), wanted.float(), rtol=0.01, atol=0.01)


def _octets(fused: ModuleType, device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(0)
    octets = torch.randn(16, 96, generator=generator).to(FLOAT8).to(device)
    factors = torch.rand(16, generator=generator).to(device)
    found = fused.unpack_octets(octets, factors, torch.float32)
    if not torch.equal(found, octets.float() * factors[:, None]):
        return False
    tokens = torch.randn(3, 96, generator=generator).bfloat16().to(device)
    first, second = fused.split(tokens, FLOAT8, 2.0**-100, 128.0, 16.0)
    halves = (first.double() * second.double()).chunk(2)
    return bool((halves[0] + halves[1] - tokens.double()).abs().max() < 2.0**-18)
