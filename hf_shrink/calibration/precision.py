"""In which precision models compute while they are worked on.

Half-precision blocks compute in float32 on a CPU: faster there, and better statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from hf_shrink.ops.precision import fast_precision
from hf_shrink.residence import at_work

HALF = (torch.bfloat16, torch.float16)


def fast_products(model: nn.Module) -> AbstractContextManager[None]:
    """`fast_precision` for a whole model.

    A float16 one with LayerNorms stays as it is on the CPU: what float16 and bfloat16 add up to is float32, and there
    LayerNorm does not take that with a weight in float16.
    """
    weights = (module.weight for module in model.modules() if isinstance(module, nn.LayerNorm))
    if any(w is not None and w.dtype == torch.float16 and w.device.type == "cpu" for w in weights):
        return nullcontext()
    return fast_precision(next(model.parameters()).device)


@contextmanager
def in_float32(block: nn.Module, enabled: bool = True) -> Iterator[None]:
    """The block in float32, and back in its own dtype afterwards. Casting back is exact for what was not changed.

    What is in float32 in a half-precision block (what corrects a router's scores) stays so.
    """
    stored = next((p.dtype for p in block.parameters() if p.dtype in HALF), torch.float32)
    if not enabled or stored not in HALF:
        yield
        return
    with at_work(block):
        whole = [(module, name) for module, name, tensor in _tensors(block) if tensor.dtype == torch.float32]
        block.to(torch.float32)
        try:
            yield
        finally:
            kept = [(module, name, getattr(module, name).data) for module, name in whole if hasattr(module, name)]
            block.to(stored)
            for module, name, data in kept:
                getattr(module, name).data = data


def _tensors(block: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    for module in block.modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            yield module, name, tensor


@contextmanager
def float32_for_now(block: nn.Module) -> Iterator[None]:
    """The block with float32 copies in the place of its half-precision tensors, which are back afterwards, untouched.

    What autograd saves of a forward pass stays float32 afterwards, and gradients go on to the block's own tensors.
    """
    with at_work(block):
        everything = [
            (tensors, name, tensor)
            for module in block.modules()
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
            if tensor is not None and tensor.dtype in HALF
        ]
        copies = {id(tensor): tensor.float() for _, _, tensor in everything}
        for tensors, name, tensor in everything:
            tensors[name] = copies[id(tensor)]  # type: ignore[assignment]  # no Parameter: it has a history
        try:
            yield
        finally:
            for tensors, name, tensor in everything:
                tensors[name] = tensor  # type: ignore[assignment]
