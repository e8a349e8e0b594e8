"""Which tensors transformers loads in a dtype of their own, whatever dtype is asked for."""

from __future__ import annotations

import copy
import re

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils.generic import ContextManagers


def loaded_dtypes(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Parameters and buffers, by name, that `from_pretrained(dtype=dtype)` gives another floating-point dtype.

    Those that the class makes in a dtype of their own (the frequencies of rotary positions), and those that it keeps in
    float32 (what corrects a router's scores). None of a module that is not transformers'.
    """
    if not isinstance(model, PreTrainedModel):
        return {}
    config = copy.deepcopy(model.config)
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if part is not None:  # parts of a model are made in their own config's dtype
            part.dtype = dtype
    kind = type(model)
    with ContextManagers([*kind.get_init_context(dtype, False, False, False), no_init_weights()]):
        skeleton = kind(config)
    tensors = (*skeleton.named_parameters(), *skeleton.named_buffers())
    found = {name: tensor.dtype for name, tensor in tensors if tensor.is_floating_point()}
    for pattern, own in skeleton._get_dtype_plan(dtype).items():
        form = re.compile(pattern.replace("*", ".*"))
        found |= {name: own for name in skeleton.state_dict().keys() & found.keys() if form.search(name)}
    return {name: own for name, own in found.items() if own != dtype}
