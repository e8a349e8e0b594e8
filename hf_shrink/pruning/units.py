"""From a bound block to what a scorer sees of it: units' rows and columns, in the order of the units."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_shrink.architectures.bound import BoundAttention, BoundMlp, Slot
from hf_shrink.architectures.linears import matrix
from hf_shrink.pruning.base import UnitView


def reader(part: BoundAttention | BoundMlp) -> Slot:
    """Where a part's units are read: the columns of its output or down matrix."""
    return part.slot("down" if isinstance(part, BoundMlp) else "output")


def group_view(attention: BoundAttention, moment: Tensor | None) -> UnitView:
    """KV groups, each with its query heads. `moment`: mean x x^T of the output matrix's input, in the model's order."""
    groups = attention.kv_heads
    rows = tuple(_rows(attention.modules, attention.slot(role), groups) for role in ("query", "key", "value"))
    output = attention.slot("output")
    return UnitView(rows, _columns(attention.modules, output, groups), _in_unit_order(moment, output))


def head_view(attention: BoundAttention, moment: Tensor | None) -> UnitView:
    """Query heads; keys and values stay when one goes, so they are not shown."""
    heads, output = attention.heads, attention.slot("output")
    rows = (_rows(attention.modules, attention.slot("query"), heads),)
    columns = _columns(attention.modules, output, heads)
    return UnitView(rows, columns, _in_unit_order(moment, output), groups=attention.kv_heads)


def channel_view(mlp: BoundMlp, moment: Tensor | None) -> UnitView:
    """MLP channels. `moment`: mean x x^T of the down matrix's input."""
    roles = ("gate", "up") if mlp.spec.gate else ("up",)
    rows = tuple(_rows(mlp.modules, mlp.slot(role), mlp.channels) for role in roles)
    down = mlp.slot("down")
    return UnitView(rows, _columns(mlp.modules, down, mlp.channels), _in_unit_order(moment, down))


def _rows(modules: Mapping[str, nn.Module], slot: Slot, units: int) -> Tensor:
    weight = matrix(modules[slot.path])
    picked = weight.index_select(0, slot.index.reshape(-1).to(weight.device))
    return picked.float().view(units, -1, weight.shape[1])


def _columns(modules: Mapping[str, nn.Module], slot: Slot, units: int) -> Tensor:
    weight = matrix(modules[slot.path])
    picked = weight.index_select(1, slot.index.reshape(-1).to(weight.device))
    return picked.float().reshape(weight.shape[0], units, -1)


def _in_unit_order(moment: Tensor | None, slot: Slot) -> Tensor | None:
    order = slot.index.reshape(-1)
    if moment is None or torch.equal(order, torch.arange(len(order))):
        return moment
    order = order.to(moment.device)
    return moment[order][:, order]
