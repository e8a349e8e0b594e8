"""Take channels out of a block's experts: from each its own ones, and as many from all, as 3D parameters have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hf_shrink.architectures.bound import MULTIPLE, BoundBlock, BoundExperts, Cuts
from hf_shrink.architectures.linears import cut
from hf_shrink.errors import ArchitectureError
from hf_shrink.plan import BlockPlan
from hf_shrink.runtime.experts import SeparateExperts
from hf_shrink.surgery.checks import check_units

AXES = {"gate": "out", "up": "out", "down": "in"}


def cut_expert_channels(block: BoundBlock, plan: BlockPlan) -> None:
    """Remove the channels that `plan` does not keep from every expert, in place. The binding is stale afterwards.

    Raises:
        ArchitectureError: the block has no experts, or they cannot lose these channels.
    """
    if plan.expert_channels is None:
        return
    cuts, experts = expert_channel_cuts(block, plan), block.experts
    assert experts is not None
    if isinstance(experts.module, SeparateExperts):
        for (path, axis), kept in cuts.items():
            module = block.module.get_submodule(path.removeprefix(block.path + "."))
            cut(module, *((kept, None) if axis == "out" else (None, kept)))
    else:
        each = [cuts[path, "in"] for path, role in experts.matrices.items() if role == "down"]
        _cut_fused(experts, each)
    set_channels(experts, experts.module, len(_kept(experts, plan)[0]))


def set_channels(experts: BoundExperts, module: nn.Module, channels: int) -> None:
    """Set what counts the channels on a mixture's module, where it has that."""
    for attribute, quantity in experts.spec.attributes.items():
        owner, _, name = attribute.rpartition(".")
        if quantity == "channels" and owner == experts.spec.module and hasattr(module, name):
            setattr(module, name, channels)


def expert_channel_cuts(block: BoundBlock, plan: BlockPlan) -> Cuts:
    """Kept positions of every matrix of every expert, by the path that it has once the experts are taken apart.

    Raises:
        ArchitectureError: as of `cut_expert_channels`.
    """
    if plan.expert_channels is None:
        return {}
    if block.experts is None:
        raise ArchitectureError(f"{block.path} has no experts whose channels could be removed")
    check_expert_channels(block.experts, plan)
    kept, start = _kept(block.experts, plan), len(block.experts.path) + 1
    return {
        (path, AXES[role]): torch.tensor(kept[int(path[start:].partition(".")[0])])
        for path, role in block.experts.matrices.items()
    }


def check_expert_channels(experts: BoundExperts, plan: BlockPlan) -> None:
    """Raises ArchitectureError where experts cannot lose channels as a block's plan says."""
    kept = _kept(experts, plan)
    for expert, channels in enumerate(kept):
        check_units(channels, experts.channels, f"{experts.path}.{expert}", "channels")
    if len(set(map(len, kept))) > 1:
        raise ArchitectureError(
            f"{experts.path}: all experts of a block have as many channels, so a plan must keep as many of each, not "
            f"{sorted(set(map(len, kept)))}"
        )
    left = len(kept[0])
    if left % MULTIPLE and not experts.channels % MULTIPLE:
        raise ArchitectureError(
            f"{experts.path}: the experts would have {left} channels; their products need a multiple of {MULTIPLE}"
        )


def _kept(experts: BoundExperts, plan: BlockPlan) -> Sequence[Sequence[int]]:
    """The kept channels of the experts that are there now, in their order: a plan numbers them as in the source."""
    assert plan.expert_channels is not None
    if len(plan.expert_channels) == experts.count:
        return plan.expert_channels
    if plan.experts is None or len(plan.experts) != experts.count or plan.experts[-1] >= len(plan.expert_channels):
        raise ArchitectureError(
            f"{experts.path} has {experts.count} experts, and the plan says of {len(plan.expert_channels)} which "
            "channels they keep"
        )
    return [plan.expert_channels[source] for source in plan.experts]


def _cut_fused(experts: BoundExperts, each: Sequence[Tensor]) -> None:
    """`each`: the kept channels of every expert."""
    gates = [torch.cat([kept, kept + experts.channels]) for kept in each]
    for name, dim, positions in ((experts.spec.fused, 0, gates), (experts.spec.down_fused, 1, each)):
        old = experts.module.get_parameter(name)
        kept = [own.index_select(dim, places.to(own.device)) for own, places in zip(old.data, positions, strict=True)]
        setattr(experts.module, name, nn.Parameter(torch.stack(kept), requires_grad=old.requires_grad))


def resize_experts(experts: BoundExperts, channels: int) -> None:
    """Give a skeleton's experts another number of channels, without values."""
    width = experts.shapes["down"][0]
    sizes = {experts.spec.fused: (2 * channels, width), experts.spec.down_fused: (width, channels)}
    for name, size in sizes.items():
        old = experts.module.get_parameter(name)
        empty = torch.empty(experts.count, *size, dtype=old.dtype, device=old.device)
        setattr(experts.module, name, nn.Parameter(empty, requires_grad=old.requires_grad))
    set_channels(experts, experts.module, channels)


def channel_counts(blocks: Sequence[BoundBlock]) -> Mapping[str, int]:
    """How many channels each mixture's experts have, by the path of its module."""
    return {block.experts.path: block.experts.channels for block in blocks if block.experts is not None}
