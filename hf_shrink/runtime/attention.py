"""Attention of one token at a time on the CPU, as transformers' "sdpa" computes it, without what makes that slow there.

torch's kernel for the CPU goes head by head, and is slow where a head has a single row of queries. The query heads that
share keys and values are therefore given to it as the rows of one head; in bfloat16, a head that shares with none is
given twice. Everything else is handed on to transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_by_group"


def sdpa_by_group(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers' `sdpa_attention_forward`, with its arguments.

    Args:
        query: (batch, heads, tokens, head size).
        key, value: (batch, KV groups, keys, head size).
        attention_mask: (batch or 1, heads or 1, tokens, keys), bool or added to the scores; or None.

    Returns:
        (batch, tokens, heads, head size of `value`), and None for the weights.
    """
    batch, heads, tokens, _ = query.shape
    groups = key.shape[1]
    share = heads // groups
    one = tokens == 1 and query.device.type == "cpu" and batch == key.shape[0] and share * groups == heads
    alone = share == 1 and query.dtype is not torch.bfloat16
    more = any(kwargs.get(name) is not None for name in ("position_bias", "softcap")) or kwargs.get("output_attentions")
    if not one or alone or dropout or more:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if share == 1:
        rows = query.repeat(1, 1, 2, 1)
    else:
        rows = query.reshape(batch, groups, share, -1)
        if attention_mask is not None and attention_mask.shape[1] != 1:
            attention_mask = attention_mask.reshape(-1, groups, share, attention_mask.shape[-1])
    output = F.scaled_dot_product_attention(rows, key, value, attn_mask=attention_mask, scale=scaling)
    return output[:, :, :share].reshape(batch, 1, heads, -1), None


def use_grouped_attention(model: nn.Module) -> list[PreTrainedConfig]:
    """Let the parts of a model that use "sdpa" use `sdpa_by_group`, in place. It is not saved with the model.

    Returns:
        The configs that were changed.
    """
    changed = []
    for part in model.modules():
        if not isinstance(part, PreTrainedModel) or part.config._attn_implementation != "sdpa":
            continue
        if part._can_set_attn_implementation():
            part.config._attn_implementation_internal = NAME
            changed.append(part.config)
    return changed


@contextmanager
def grouped_attention(model: nn.Module) -> Iterator[None]:
    """`use_grouped_attention` for a while."""
    changed = use_grouped_attention(model)
    try:
        yield
    finally:
        for config in changed:
            config._attn_implementation_internal = "sdpa"


def register() -> None:
    """Make the name known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(NAME, sdpa_by_group)
    AttentionMaskInterface.register(NAME, sdpa_mask)


register()
