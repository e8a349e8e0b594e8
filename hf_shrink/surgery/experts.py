"""Take experts out of a block's mixture: their weights, their entries in the router, and what counts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_shrink.architectures.binding import Binding
from hf_shrink.architectures.bound import BoundBlock, BoundExperts
from hf_shrink.architectures.linears import cut, is_matrix
from hf_shrink.errors import ArchitectureError
from hf_shrink.ops.merging import merged
from hf_shrink.plan import BlockPlan
from hf_shrink.runtime.experts import SeparateExperts
from hf_shrink.surgery.checks import check_units
from hf_shrink.surgery.depth import stack_configs


def cut_experts(block: BoundBlock, plan: BlockPlan, config: PretrainedConfig) -> None:
    """Remove the experts that `plan` does not keep, in place. The binding is stale afterwards.

    Args:
        config: with the keys of the block's stack, as they were before any expert was removed.

    Raises:
        ArchitectureError: the block has no experts, or they cannot be removed so.
    """
    if plan.experts is None:
        return
    experts = block.experts
    if experts is None:
        raise ArchitectureError(f"{block.path} has no experts that could be removed")
    check_experts(experts, plan, config)
    _merge(experts, plan.merges or ())
    kept = torch.tensor(plan.experts)
    if isinstance(experts.module, SeparateExperts):
        experts.module.keep(plan.experts)
    else:
        for name in (experts.spec.fused, experts.spec.down_fused):
            _select(experts.module, name, kept)
    for entry in experts.spec.entries:
        path, _, name = entry.rpartition(".")
        owner = block.module.get_submodule(path)
        if is_matrix(owner) and name == "weight":
            cut(owner, kept, None)
        elif getattr(owner, name, None) is not None:
            _select(owner, name, kept)
    values = {"experts": len(plan.experts), "experts_of_token": experts_of_token(experts, len(plan.experts), config)}
    for attribute, quantity in experts.spec.attributes.items():
        path, _, name = attribute.rpartition(".")
        if quantity in values:
            setattr(block.module.get_submodule(path), name, values[quantity])


def check_experts(experts: BoundExperts, plan: BlockPlan, config: PretrainedConfig) -> None:
    """Raises ArchitectureError where experts cannot be removed as a block's plan says."""
    assert plan.experts is not None
    check_units(plan.experts, experts.count, experts.path, "experts")
    if experts.spec.fixed is not None and len(plan.experts) != experts.count:
        raise ArchitectureError(f"experts of {experts.path} cannot be removed: {experts.spec.fixed}")
    groups = group_count(experts, config)
    size = experts.count // groups
    left = [sum(expert // size == group for expert in plan.experts) for group in range(groups)]
    if len(set(left)) > 1 or left[0] < least_in_group(experts):
        raise ArchitectureError(
            f"the router of {experts.path} ranks groups of experts ({groups} of {size}) by the two best of each, so a "
            "plan must keep the same number of experts in each group, at least 2"
        )
    kept, gone = set(plan.experts), set(range(experts.count)) - set(plan.experts)
    shares: dict[int, float] = {}
    for expert, into, share in plan.merges or ():
        if expert not in gone or into not in kept or not 0 <= share <= 1:
            raise ArchitectureError(
                f"{experts.path}: a plan merges removed experts into kept ones, with shares between 0 and 1; "
                f"({expert}, {into}, {share}) does not"
            )
        shares[into] = shares.get(into, 0.0) + share
    if any(share > 1 for share in shares.values()):
        raise ArchitectureError(f"{experts.path}: the shares merged into one expert add up to more than 1")


def settle_experts(model: PreTrainedModel, binding: Binding) -> None:
    """Write the number of experts that is left into the config, and into the models that remember it, in place.

    And their number of channels, where all have as many and a key says it.

    Raises:
        ArchitectureError: blocks have different numbers of experts, which no config can say.
    """
    for stack in binding.stacks:
        mixtures = [block.experts for block in stack.blocks if block.experts is not None]
        if not mixtures:
            continue
        first, configs = mixtures[0], stack_configs(model, stack)
        if first.spec.channels is not None and len({experts.channels for experts in mixtures}) == 1:
            for config in configs:
                setattr(config, first.spec.channels, first.channels)
        if len({experts.count for experts in mixtures}) > 1:
            raise ArchitectureError(
                f"blocks of {stack.path} have different numbers of experts, which no config can say"
            )
        if getattr(configs[0], first.spec.count) == first.count:
            continue
        of_token = experts_of_token(first, first.count, configs[0])
        for config in configs:
            setattr(config, first.spec.count, first.count)
            setattr(config, first.spec.of_token, of_token)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):  # for the loss that balances experts
                remembered = {"num_experts": first.count, "num_experts_per_tok": of_token}
                vars(module).update({name: value for name, value in remembered.items() if name in vars(module)})


def group_count(experts: BoundExperts, config: PretrainedConfig) -> int:
    """Groups of neighbouring experts that the router chooses among first; 1 where all experts compete."""
    key = experts.spec.groups
    return 1 if key is None else int(getattr(config, key, None) or 1)


def least_in_group(experts: BoundExperts) -> int:
    """How many experts a group must keep: stock's routers rank groups, also a single one, by their two best experts."""
    return 1 if experts.spec.groups is None else 2


def experts_of_token(experts: BoundExperts, left: int, config: PretrainedConfig) -> int:
    """To how many experts a token goes once `left` of them are left: as many as before, where there are so many."""
    reachable = left
    groups, key = group_count(experts, config), experts.spec.groups_of_token
    if groups > 1 and key is not None:
        reachable = left // groups * int(getattr(config, key))
    return min(int(getattr(config, experts.spec.of_token)), reachable)


def expert_weights(experts: BoundExperts, index: int) -> dict[str, Tensor]:
    """An expert's matrices by role, (out, in): views, so that writes go through."""
    if isinstance(experts.module, SeparateExperts):
        return {role: experts.module.matrix(index, role).weight.data for role in experts.names}  # type: ignore[misc]
    both = experts.module.get_parameter(experts.spec.fused).data[index]
    channels = experts.shapes["gate"][0]
    down = experts.module.get_parameter(experts.spec.down_fused).data[index]
    return {"gate": both[:channels], "up": both[channels:], "down": down}


def _merge(experts: BoundExperts, merges: Sequence[tuple[int, int, float]]) -> None:
    parts: dict[int, list[tuple[Mapping[str, Tensor], float]]] = {}
    for expert, into, share in merges:
        parts.setdefault(into, []).append((expert_weights(experts, expert), share))
    for into, others in parts.items():
        kept = expert_weights(experts, into)
        for role, weight in merged(kept, others).items():
            kept[role].copy_(weight)


def _select(owner: nn.Module, name: str, kept: Tensor) -> None:
    """Keep some entries of a parameter or buffer."""
    old = getattr(owner, name)
    new = old.data.index_select(0, kept.to(old.device))
    setattr(owner, name, nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new)
