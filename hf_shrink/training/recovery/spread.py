"""A recovery in several processes: what they must agree on, and what FSDP trains in the model's place."""

from __future__ import annotations

import copy
import os
from contextlib import closing

import torch
from accelerate.utils import parse_flag_from_env
from accelerate.utils.fsdp_utils import fsdp2_canonicalize_names
from torch import nn

from hf_shrink.errors import ShrinkError
from hf_shrink.pruning.zeros import ZeroKeeper
from hf_shrink.sharding import ranks
from hf_shrink.training.models import whole


def spreads() -> bool:
    """Whether the processes were started to spread the weights over them (FSDP).

    Raises ShrinkError where they were started in a way that leaves no whole parameters.
    """
    if ranks().size == 1:
        return False
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ShrinkError("recover does not work with DeepSpeed; start it with DDP or FSDP2 (accelerate launch)")
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return False
    if int(os.environ.get("FSDP_VERSION", "1")) != 2:
        raise ShrinkError(
            "FSDP1 keeps weights as flat pieces, from which no matrix can be taken; start with --fsdp_version 2"
        )
    return True


def alike(*models: nn.Module | None) -> None:
    """Give all processes the first one's weights: others may have loaded none (FSDP's cpu_ram_efficient_loading)."""
    for model in models:
        if model is not None:
            ranks().copy_first(*model.parameters(), *model.buffers())


class Stand:
    """A copy of what is trained, which FSDP takes apart in its place: it changes a model for good.

    Attributes:
        model: the copy.

    Raises:
        ShrinkError: weights have zeros that training must keep.
    """

    def __init__(self, trained: nn.Module) -> None:
        with closing(ZeroKeeper(trained)) as keeper:
            if keeper.kept:
                raise ShrinkError("zeros of single weights cannot be kept under FSDP; start the processes with DDP")
        self.model = copy.deepcopy(trained)
        self._trained = trained

    def give_back(self) -> None:
        """Put the weights that were trained, in pieces in all processes, into the model that the copy was made of."""
        found = fsdp2_canonicalize_names(dict(self.model.named_parameters()))
        with torch.no_grad():
            for name, parameter in self._trained.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(whole(found[name]))
