"""What others ask of the residence of a model, or of one of its blocks, without knowing whether there is one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from hf_shrink.residence.pages import is_own
from hf_shrink.residence.residence import ATTRIBUTE, NAME, Residence, tensors_of


def residence_of(module: nn.Module) -> Residence | None:
    """What looks after a model or one of its blocks; None where that simply is in memory."""
    found: Residence | None = vars(module).get(ATTRIBUTE)
    return found


def rest(block: nn.Module) -> None:
    """As `Residence.rest`. Does nothing for a model that is simply in memory."""
    residence = residence_of(block)
    if residence is not None:
        residence.rest(block)


def twin(block: nn.Module) -> nn.Module:
    """A copy of a block that is about to get other tensors; those that lie in files are not copied."""
    residence = residence_of(block)
    memo: dict[int, Any] = {}
    with at_work(block):
        if residence is not None and residence.rests:
            for parameter in block.parameters():
                if not is_own(parameter):
                    memo[id(parameter)] = nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
        return copy.deepcopy(block, memo)


def at_work(block: nn.Module) -> AbstractContextManager[None]:
    """Have a block's weights where it runs, whatever other block runs meanwhile."""
    residence = residence_of(block)
    return nullcontext() if residence is None else residence.staying(block)


def forget(copied: nn.Module, block: nn.Module) -> None:
    """Nobody needs a `twin` of `block` any more."""
    residence = residence_of(block)
    if residence is not None:
        for tensor in tensors_of(copied).values():
            residence.glanced_at(tensor)
    copied.to("meta")


def rest_at(model: nn.Module, path: str) -> None:
    """As `rest`, of the block around the module at `path`, if that is in one."""
    module = model
    for name in path.split("."):
        module = module.get_submodule(name)
        if NAME in vars(module):
            rest(module)
            return


def visited(model: nn.Module) -> bool:
    """Whether the model's blocks come to an accelerator one at a time."""
    residence = residence_of(model)
    return residence is not None and residence.visited


def cast(model: nn.Module, dtype: torch.dtype, own: Mapping[str, torch.dtype]) -> None:
    """The model's weights in another dtype, in place and block by block; those named in `own` in that one."""
    residence = residence_of(model)
    apart = {
        (id(module), leaf): own[name]
        for path, module in model.named_modules()
        for leaf in (*module._parameters, *module._buffers)
        if (name := f"{path}.{leaf}".removeprefix(".")) in own
    }
    for block in residence.blocks if residence is not None else ():
        _cast(block, dtype, apart)
        rest(block)
    _cast(model, dtype, apart)


def _cast(module: nn.Module, dtype: torch.dtype, apart: Mapping[tuple[int, str], torch.dtype]) -> None:
    kept: list[tuple[Any, str, torch.Tensor, torch.Tensor, torch.dtype]] = [
        (tensors, leaf, tensor, tensor.data, apart[id(part), leaf])
        for part in module.modules()
        for tensors in (part._parameters, part._buffers)
        for leaf, tensor in tensors.items()
        if tensor is not None and (id(part), leaf) in apart
    ]
    module.to(dtype)
    for tensors, leaf, tensor, data, own in kept:
        tensor.data = data.to(own)
        tensors[leaf] = tensor  # of a buffer, the cast is another object
