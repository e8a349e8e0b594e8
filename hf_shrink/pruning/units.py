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


def group_view(attention: BoundAttention, moment: Tensor | None, gradients: Tensor | None = None) -> UnitView:
    """KV groups, each with its query heads.

    Args:
        moment: mean x x^T of the output matrix's input, in the model's order.
        gradients: (samples, in), by a mask on each input of that matrix.
    """
    groups = attention.kv_heads
    rows = tuple(_rows(attention.modules, attention.slot(role), groups) for role in ("query", "key", "value"))
    output = attention.slot("output")
    columns = _columns(attention.modules, output, groups)
    return UnitView(rows, columns, _in_unit_order(moment, output), _by_unit(gradients, output, groups))


def head_view(attention: BoundAttention, moment: Tensor | None, gradients: Tensor | None = None) -> UnitView:
    """Query heads; keys and values stay when one goes, so they are not shown. Arguments as in `group_view`."""
    heads, output = attention.heads, attention.slot("output")
    rows = (_rows(attention.modules, attention.slot("query"), heads),)
    columns = _columns(attention.modules, output, heads)
    seen = _in_unit_order(moment, output), _by_unit(gradients, output, heads)
    return UnitView(rows, columns, *seen, groups=attention.kv_heads)


def channel_view(mlp: BoundMlp, moment: Tensor | None, gradients: Tensor | None = None) -> UnitView:
    """MLP channels. Arguments as in `group_view`, of the down matrix."""
    roles = ("gate", "up") if mlp.spec.gate else ("up",)
    rows = tuple(_rows(mlp.modules, mlp.slot(role), mlp.channels) for role in roles)
    down = mlp.slot("down")
    columns = _columns(mlp.modules, down, mlp.channels)
    return UnitView(rows, columns, _in_unit_order(moment, down), _by_unit(gradients, down, mlp.channels))


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


def _by_unit(gradients: Tensor | None, slot: Slot, units: int) -> Tensor | None:
    """(samples, units): a mask on a unit is one on all of its inputs."""
    if gradients is None:
        return None
    picked = gradients.index_select(1, slot.index.reshape(-1).to(gradients.device))
    return picked.view(len(gradients), units, -1).sum(-1)
