"""Whole weights of a model that FSDP has spread over processes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.pytorch_utils import Conv1D

from hf_shrink.errors import ShrinkError


def check_shapes(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Raises ShrinkError where weights are flat pieces, which have no rows and groups."""
    flat = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    for module in modules:
        weight = module.weight
        assert isinstance(weight, Tensor)
        if flat or weight.dim() != 2:
            raise ShrinkError(
                "FSDP1 and DeepSpeed's ZeRO-3 keep weights as flat pieces, which cannot be rounded group by group; use "
                "FSDP2 (version: 2 in fsdp_config), ZeRO-2 or DDP"
            )


def add_whole(module: nn.Module, change: Tensor) -> None:
    """Add (out_features, in_features), the same on every process, to a module's weight, which may be in pieces."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    change = change.to(weight.dtype).t() if isinstance(module, Conv1D) else change.to(weight.dtype)
    with torch.no_grad():
        if isinstance(weight, DTensor):
            change = distribute_tensor(change, weight.device_mesh, weight.placements)
        weight.add_(change)
