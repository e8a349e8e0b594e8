"""Whole weights of a model that FSDP may have spread over processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.pytorch_utils import Conv1D


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, parameters that FSDP1 holds flat and in pieces are whole, and what is written to them is kept.

    Every process has to come here. Does nothing for other models: FSDP2's parameters are DTensors, see `whole`.
    """
    if not any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        yield
        return
    with FullyShardedDataParallel.summon_full_params(model, writeback=True):
        yield


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is in pieces, for which every process has to come here; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def add_whole(module: nn.Module, change: Tensor) -> None:
    """Add (out_features, in_features), the same on every process, to a module's weight, which may be in pieces."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    change = change.to(weight.dtype).t() if isinstance(module, Conv1D) else change.to(weight.dtype)
    with torch.no_grad():
        if isinstance(weight, DTensor):
            change = distribute_tensor(change, weight.device_mesh, weight.placements)
        weight.add_(change)
