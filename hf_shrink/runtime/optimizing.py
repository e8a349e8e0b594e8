"""All packed Linears of a model on the kernels of its device, and back."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, nn

from hf_shrink.runtime.linear import CompressedLinear
from hf_shrink.runtime.packed import PackedModule


def use_kernels(model: nn.Module) -> None:
    """Give every packed Linear the fastest kernel for where it is, in place. What is on one already stays."""
    holders = Counter(id(m.held) for m in model.modules() if isinstance(m, PackedModule))
    lent = False
    for module in model.modules():
        if not isinstance(module, CompressedLinear) or module.kernel is not None:
            continue
        if holders[id(module.held)] > max(1, len(module.sharing)):
            module.kernel_note = "its weight is shared by hand"
            continue
        lent = lent or _is_lent(module.held)
        module.optimize()
    if lent:
        _own(model)


def _own(model: nn.Module) -> None:
    """Copy what still lies in the mapped file that a checkpoint was loaded from, so that the file is let go: it is held
    as a whole, with the packed weights that nothing needs any more."""
    copies: dict[tuple[Any, ...], Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None or tensor.device.type != "cpu" or not _is_lent(tensor):
                    continue
                key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
                if key not in copies:
                    copies[key] = tensor.detach().clone()
                if isinstance(tensor, nn.Parameter):
                    tensor.data = copies[key]
                else:
                    module._buffers[name] = copies[key]


def _is_lent(tensor: Tensor) -> bool:
    """Whether the memory is another's: torch cannot resize what it has not allocated."""
    return tensor.device.type == "cpu" and not tensor.untyped_storage().resizable()


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
