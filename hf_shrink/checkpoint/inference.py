"""`optimize_for_inference`: a compressed model on the fastest kernels that torch ships for its device."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from hf_shrink.checkpoint.casts import allow_casts
from hf_shrink.checkpoint.others import take_over
from hf_shrink.residence.trim import release_free_memory
from hf_shrink.runtime.attention import use_grouped_attention
from hf_shrink.runtime.optimizing import use_kernels

Module = TypeVar("Module", bound=nn.Module)


def optimize_for_inference(model: Module, *, device: torch.device | str | None = None) -> Module:
    """Let a compressed model's Linears multiply with the kernels that torch ships for its device, in place.

    Each weight is then held once, in its kernel's layout. Everything else stays as it was: `state_dict` and
    `save_pretrained` give the same checkpoint, bit for bit; casts, moves to other devices, copies and training work.
    The kernels take bfloat16: up to some tens of tokens, a float32 model's inputs are rounded to it for each Linear.
    Attention by transformers' "sdpa" takes another way to the same result for single tokens (`runtime/attention.py`),
    which has a name of its own. transformers' `generate_batch` (continuous batching) knows stock names only: call
    `model.set_attn_implementation("sdpa")` before it.
    `kernel_summary(model)` says what runs on what, and why the rest does not.

    `shrink` does this by itself unless called with `optimize=False`, and `from_pretrained` with checkpoints of ours
    unless called with `quantization_config=LoadingConfig(optimize=False)`.

    Args:
        model: with weights packed by hf_shrink, or a compressed-tensors checkpoint of another tool as `from_pretrained`
            loads it, before its first forward pass, which makes it dense. Calling it again changes nothing.
        device: where to move the model first; by default it stays.

    Returns:
        The same object.

    Raises:
        CheckpointError: another tool's checkpoint is stored in a way that hf_shrink does not know, or is dense already.
    """
    take_over(model)
    allow_casts(model)
    if device is not None:
        model.to(device)
    use_kernels(model)
    use_grouped_attention(model)
    release_free_memory()  # what held the weights in the checkpoint's layout
    return model
