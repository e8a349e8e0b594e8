"""All packed Linears of a model on the kernels of its device, and back."""

from __future__ import annotations

from collections import Counter

from torch import nn

from hf_shrink.runtime.linear import CompressedLinear
from hf_shrink.runtime.packed import PackedModule


def use_kernels(model: nn.Module) -> None:
    """Give every packed Linear the fastest kernel for where it is, in place. What is on one already stays."""
    holders = Counter(id(m.weight_packed) for m in model.modules() if isinstance(m, PackedModule) and m.kernel is None)
    for module in model.modules():
        if not isinstance(module, CompressedLinear) or module.kernel is not None:
            continue
        if holders[id(module.weight_packed)] > 1:
            module.kernel_note = "its weight is shared with an embedding"
        else:
            module.optimize()


def restore_layout(model: nn.Module) -> None:
    """Hold all packed weights as a checkpoint does, in place."""
    for module in model.modules():
        if isinstance(module, PackedModule):
            module.restore()


def kernel_summary(model: nn.Module) -> dict[str, list[str]]:
    """Paths of a model's packed modules by what multiplies them: a kernel's name, or why there is none."""
    found: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, PackedModule):
            found.setdefault(module.kernel_note, []).append(path)
    return found
