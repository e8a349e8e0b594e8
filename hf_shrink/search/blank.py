"""A Sensitivity by which nothing costs anything: for the problem's sizes, before anything is measured."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from hf_shrink.architectures.binding import Binding
from hf_shrink.architectures.bound import BoundAttention, BoundExperts, BoundMlp
from hf_shrink.ops.removal import RemovalCurve
from hf_shrink.pruning.curves import PartCurves
from hf_shrink.pruning.items import Items
from hf_shrink.pruning.plan_width import FIELDS
from hf_shrink.search.measuring import Space
from hf_shrink.search.outer import outer_weights
from hf_shrink.search.pieces import find_pieces
from hf_shrink.search.sensitivity import Rounding, Sensitivity


def blank_sensitivity(model: nn.Module, binding: Binding, space: Space, quantizable: Collection[str]) -> Sensitivity:
    """What `measure` gives, with 0 everywhere and units in their own order; takes no data."""
    free = dict.fromkeys(space.schemes, 0.0)
    dropped = {}
    if space.depth and binding.family is not None:
        for parts in ("blocks",) if space.portable else ("blocks", "any"):
            items = Items(model, binding, parts)
            for number, item in enumerate(items.all):
                if items.allowed([number]):
                    dropped[item.stack.name, item.block.index, item.part] = 0.0
    curves: dict[tuple[str, int, str], PartCurves] = {}
    if space.width and binding.family is not None:
        for stack in binding.stacks:
            for block in stack.blocks:
                for kind in FIELDS:
                    part: BoundAttention | BoundMlp | BoundExperts | None = getattr(block, kind)
                    if part is not None:
                        curves[stack.name, block.index, kind] = _flat(part)
    return Sensitivity(
        rounding={piece.name: Rounding(free) for piece in find_pieces(binding, quantizable)} if space.schemes else {},
        outer={paths[0]: free for paths in outer_weights(model)} if space.embeddings else {},
        curves=curves,
        dropped=dropped,
    )


def _flat(part: BoundAttention | BoundMlp | BoundExperts) -> PartCurves:
    if isinstance(part, BoundMlp):
        return PartCurves(_curve(part.channels))
    if isinstance(part, BoundExperts):
        return PartCurves(_curve(part.channels * part.count, _in_turn(part.channels * part.count, part.count)))
    return PartCurves(_curve(part.heads, _in_turn(part.heads, part.kv_heads)), _curve(part.kv_heads))


def _in_turn(units: int, owners: int) -> torch.Tensor:
    """One unit of every group or expert before the next of any, as their order has to be."""
    return torch.arange(units).view(owners, -1).T.reshape(-1)


def _curve(units: int, order: torch.Tensor | None = None) -> RemovalCurve:
    nothing = torch.zeros(units, dtype=torch.float64)
    return RemovalCurve(torch.arange(units) if order is None else order, nothing, nothing)
