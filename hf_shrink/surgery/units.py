"""Cut query heads and channels, those of experts too, out of one block."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_shrink.architectures.bound import BoundAttention, BoundBlock, BoundMlp, Cuts
from hf_shrink.architectures.linears import cut, matrix
from hf_shrink.errors import ArchitectureError
from hf_shrink.plan import BlockPlan
from hf_shrink.surgery.checks import check_units
from hf_shrink.surgery.expert_channels import check_expert_channels, cut_expert_channels, expert_channel_cuts

CONFIG_PREFIX = "config."  # of an attribute that a module reads from its config


def cut_block(block: BoundBlock, plan: BlockPlan) -> None:
    """Remove the query heads and channels that `plan` does not keep, in place. The binding is stale afterwards."""
    check_cuts(block, plan)
    for attention, heads in ((block.attention, plan.query_heads), (block.cross_attention, plan.cross_heads)):
        if attention is not None and heads is not None:
            _cut_attention(attention, heads)
    if plan.channels is not None and block.mlp is not None:
        _cut(block.mlp, block.mlp.cuts(plan.channels))
        values = {"channels": len(plan.channels)}
        for name, quantity in block.mlp.spec.attributes.items():
            set_attribute(block.mlp.module, name, values[quantity])
    cut_expert_channels(block, plan)


def check_cuts(block: BoundBlock, plan: BlockPlan) -> None:
    """Raises ArchitectureError where a block cannot keep the heads and channels of `plan`, those of experts too."""
    for attention, heads in ((block.attention, plan.query_heads), (block.cross_attention, plan.cross_heads)):
        if heads is None:
            continue
        if attention is None:
            raise ArchitectureError(f"{block.path} has no such attention whose heads could be removed")
        check_units(heads, attention.heads, attention.path, "query heads")
        if attention.spec.fixed is not None and len(heads) != attention.heads:
            raise ArchitectureError(f"heads of {attention.path} cannot be removed: {attention.spec.fixed}")
        attention.groups_of(heads)
    if plan.channels is not None:
        if block.mlp is None:
            raise ArchitectureError(f"{block.path} has no MLP whose channels could be removed")
        check_units(plan.channels, block.mlp.channels, block.mlp.path, "channels")
    if plan.expert_channels is not None:
        if block.experts is None:
            raise ArchitectureError(f"{block.path} has no experts whose channels could be removed")
        check_expert_channels(block.experts, plan)


def _cut_attention(attention: BoundAttention, heads: Sequence[int]) -> None:
    groups = attention.groups_of(heads)
    _cut(attention, attention.cuts(heads))
    for path, dim in attention.per_head.items():
        _cut_per_head(attention.module, path, dim, heads)
    for name, quantity in attention.spec.attributes.items():
        set_attribute(attention.module, name, attention.quantity(quantity, len(heads), len(groups)))


def matrix_cuts(block: BoundBlock, plan: BlockPlan) -> Cuts:
    """Kept rows ("out") and columns ("in") of every matrix that `plan` cuts, by path and axis."""
    cuts: Cuts = {}
    for part, units in (
        (block.attention, plan.query_heads),
        (block.cross_attention, plan.cross_heads),
        (block.mlp, plan.channels),
    ):
        if part is not None and units is not None:
            cuts |= part.cuts(units)
    return cuts | expert_channel_cuts(block, plan)


def consumer_cuts(block: BoundBlock, plan: BlockPlan) -> dict[str, Tensor]:
    """Kept input positions, ascending, of every matrix that reads units which `plan` cuts, by path."""
    return {path: kept for (path, axis), kept in matrix_cuts(block, plan).items() if axis == "in"}


def cut_shapes(block: BoundBlock, plan: BlockPlan) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) after `plan` of every matrix that it cuts, by path."""
    shapes = {}
    for part, units in (
        (block.attention, plan.query_heads),
        (block.cross_attention, plan.cross_heads),
        (block.mlp, plan.channels),
    ):
        cuts = part.cuts(units) if part is not None and units is not None else {}
        for path in {path for path, _ in cuts}:
            assert part is not None
            rows, columns = matrix(part.modules[path]).shape
            shapes[path] = (
                cuts[path, "out"].numel() if (path, "out") in cuts else rows,
                cuts[path, "in"].numel() if (path, "in") in cuts else columns,
            )
    for (path, axis), kept in expert_channel_cuts(block, plan).items():
        assert block.experts is not None
        rows, columns = block.experts.shapes[block.experts.matrices[path]]
        shapes[path] = (len(kept), columns) if axis == "out" else (rows, len(kept))
    return shapes


def _cut(part: BoundAttention | BoundMlp, cuts: Mapping[tuple[str, str], Tensor]) -> None:
    for path, module in part.modules.items():
        rows, columns = cuts.get((path, "out")), cuts.get((path, "in"))
        if rows is not None or columns is not None:
            cut(module, rows, columns)


def _cut_per_head(owner: nn.Module, path: str, dim: int, heads: Sequence[int]) -> None:
    """A parameter with one entry a head; absent in blocks that do not carry it."""
    module_path, _, name = path.rpartition(".")
    try:
        module = owner.get_submodule(module_path)
    except AttributeError:
        return
    old = getattr(module, name)
    kept = old.data.index_select(dim, torch.as_tensor(heads, device=old.device))
    setattr(module, name, nn.Parameter(kept, requires_grad=old.requires_grad))
    if isinstance(module, nn.Embedding):
        module.embedding_dim = kept.shape[1]


def set_attribute(module: nn.Module, name: str, value: int) -> None:
    """Set an attribute; "config.key" sets it on a copy of the module's config, which other blocks share."""
    if name.startswith(CONFIG_PREFIX):
        module.config = copy.copy(module.config)
        setattr(module.config, name.removeprefix(CONFIG_PREFIX), value)
    else:
        setattr(module, name, value)


def get_attribute(module: nn.Module, name: str) -> Any:
    """The attribute that `set_attribute` sets."""
    owner = module.config if name.startswith(CONFIG_PREFIX) else module
    return getattr(owner, name.removeprefix(CONFIG_PREFIX))
