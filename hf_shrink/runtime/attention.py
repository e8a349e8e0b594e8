"""Attention on the CPU, as transformers' "sdpa" computes it, without what makes that slow there.

torch's kernel for the CPU goes head by head. It is slow where a head has a single row of queries: the query heads that
share keys and values are therefore given to it as the rows of one head; in bfloat16, a head that shares with none is
given twice. And it takes up to three times as long as the plain products of many rows in bfloat16: a causal prompt is
therefore multiplied and normalised some rows at a time. Everything else is handed on to transformers.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_shrink.ops.precision import multiplies_bfloat16

NAME = "sdpa_by_group"
ROWS = 64  # of queries at a time; for fewer, the kernel is as good

# Code that asks for an implementation by its name, and would not know ours. No harm is in names that neither ours nor
# "sdpa" is, and in transformers' tables (ALL_...), which ours is in.
_ASKS_FOR_NAMES = re.compile(
    r"""attn_impl\w*\s*(?:[=!]=|(?:not\s+)?in\b)(?!\s*(?:["'](?:eager|flex_attention|flash_attention_\d)["']|ALL_))
    |["']sdpa["']\s*(?:[=!]=|(?:not\s+)?in\b)
    |\b(?!ALL_)\w+(?:\[|\.get\()[^\])\n]*attn_impl""",
    re.VERBOSE,
)


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
    share = query.shape[1] // key.shape[1]
    plain = query.device.type == "cpu" and share * key.shape[1] == query.shape[1] and not dropout
    plain = plain and all(kwargs.get(name) is None for name in ("position_bias", "softcap"))
    if plain and not kwargs.get("output_attentions"):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if query.shape[2] == 1:
            if query.shape[0] == key.shape[0] and (share > 1 or query.dtype is torch.bfloat16):
                return _one_token(query, key, value, attention_mask, scale), None
        elif attention_mask is None and _is_causal(module, kwargs) and _in_rows(query, key, value):
            return _some_rows_at_a_time(query, key, value, scale), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def _one_token(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    batch, heads, groups = *query.shape[:2], key.shape[1]
    share = heads // groups
    if share == 1:
        rows = query.repeat(1, 1, 2, 1)
    else:
        rows = query.reshape(batch, groups, share, -1)
        if mask is not None and mask.shape[1] != 1:
            mask = mask.reshape(-1, groups, share, mask.shape[-1])
    output = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)
    return output[:, :, :share].reshape(batch, 1, heads, -1)


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _in_rows(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether it gains: in bfloat16 only. Gradients are left to the kernel, and graphs of any length as well."""
    if query.shape[2] <= ROWS or query.shape[0] != key.shape[0] or torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value)):
        return False
    return _dtype(query) is torch.bfloat16 and multiplies_bfloat16(query.device)


def _dtype(query: Tensor) -> torch.dtype:
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def _some_rows_at_a_time(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention, with scores and weights in the products' dtype, as "eager" has them."""
    dtype = _dtype(query)
    batch, heads, tokens, groups = *query.shape[:3], key.shape[1]
    with torch.autocast(query.device.type, enabled=False):
        queries, values = (query * scale).to(dtype), value.to(dtype)
        keys = key.to(dtype).transpose(2, 3)
        later = torch.full((ROWS, ROWS), -torch.inf, dtype=dtype).triu(1)
        output = queries.new_empty(batch, tokens, heads, value.shape[-1])
        for start in range(0, tokens, ROWS):
            stop = min(start + ROWS, tokens)
            count = stop - start
            scores = queries[:, :, start:stop].reshape(batch, groups, -1, query.shape[-1]) @ keys[..., :stop]
            scores.view(batch, heads, count, stop)[..., start:] += later[:count, :count]
            part = scores.softmax(-1) @ values[:, :, :stop]
            output[:, start:stop] = part.view(batch, heads, count, -1).transpose(1, 2)
    return output


def use_grouped_attention(model: nn.Module) -> None:
    """Let the parts of a model that use "sdpa" use `sdpa_by_group`, in place. It is not saved with the model.

    Parts whose own code asks whether the name is "sdpa" keep it.
    """
    _rename(model, "sdpa", NAME)


@contextmanager
def grouped_attention(*models: nn.Module) -> Iterator[None]:
    """`use_grouped_attention` for a while, for those that do not use it already."""
    changed = [model for model in models if _rename(model, "sdpa", NAME)]
    try:
        yield
    finally:
        for model in changed:
            _rename(model, NAME, "sdpa")


def _rename(model: nn.Module, old: str, new: str) -> bool:
    """From one implementation to another wherever the model may choose; whether any part did."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    found = [p for p in parts if p.config._attn_implementation == old and p._can_set_attn_implementation()]
    if new == NAME:  # parts can have one config together
        kept = {id(part.config) for part in parts if _knows_stock_names_only(type(part))}
        found = [part for part in found if id(part.config) not in kept]
    for part in found:
        part.config._attn_implementation_internal = new
    return bool(found)


def _knows_stock_names_only(kind: type[PreTrainedModel]) -> bool:
    parents = [parent for parent in kind.__mro__ if issubclass(parent, PreTrainedModel) and parent != PreTrainedModel]
    return any(_asks_for_names(parent.__module__) for parent in parents)


@cache
def _asks_for_names(module: str) -> bool:
    """Whether a module's code does; also where there is no code to look at."""
    try:
        return _ASKS_FOR_NAMES.search(inspect.getsource(sys.modules[module])) is not None
    except (KeyError, OSError, TypeError):
        return True


def register() -> None:
    """Make the name known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(NAME, sdpa_by_group)
    AttentionMaskInterface.register(NAME, sdpa_mask)


register()
