"""Resolve a mixture's experts on one block, from their 3D parameters or once they were taken apart."""

from __future__ import annotations

import torch
from torch import nn

from hf_shrink.architectures.base import Experts, Mlp
from hf_shrink.architectures.bound import BoundExperts, BoundMlp, Slot
from hf_shrink.architectures.linears import shape
from hf_shrink.errors import ArchitectureError


def bind_experts(spec: Experts, path: str, block: nn.Module) -> BoundExperts | None:
    """The block's experts; None for a block without (dense blocks between sparse ones).

    Raises:
        ArchitectureError: the module is there, but not made as `Experts` says.
    """
    try:
        module = block.get_submodule(spec.module)
    except AttributeError:
        return None
    full = f"{path}.{spec.module}"
    if hasattr(module, spec.fused):
        count, shapes = _fused_shapes(spec, full, module)
        return BoundExperts(spec, full, module, False, count, shapes)
    count = sum(hasattr(child, spec.down) for child in module.children())
    if count == 0:
        raise ArchitectureError(
            f"{full} has neither the parameter {spec.fused!r} nor experts with {spec.down!r}; this model does not "
            "match the table of its family"
        )
    first = module.get_submodule("0")
    names = {"gate": spec.gate, "up": spec.up, "down": spec.down}
    return BoundExperts(
        spec, full, module, True, count, {r: shape(first.get_submodule(name)) for r, name in names.items()}
    )


def _fused_shapes(spec: Experts, path: str, module: nn.Module) -> tuple[int, dict[str, tuple[int, int]]]:
    fused, down = module.get_parameter(spec.fused), module.get_parameter(spec.down_fused)
    count, width, channels = down.shape
    if tuple(fused.shape) != (count, 2 * channels, width) or len(list(module.parameters())) != 2:
        raise ArchitectureError(
            f"{path}: {spec.fused} {tuple(fused.shape)} and {spec.down_fused} {tuple(down.shape)} are not "
            "(experts, 2 * channels, width) and (experts, width, channels) without biases"
        )
    return count, {"gate": (channels, width), "up": (channels, width), "down": (width, channels)}


def expert_mlps(experts: BoundExperts) -> tuple[BoundMlp, ...]:
    """Every expert as an MLP of its own. They must have been taken apart."""
    spec, each = experts.spec, torch.arange(experts.channels)[:, None]
    form = Mlp(up=spec.up, down=spec.down, gate=spec.gate, channels=spec.channels)
    found = []
    for number in range(experts.count):
        path = f"{experts.path}.{number}"
        module = experts.module.get_submodule(str(number))
        paths = {role: f"{path}.{name}" for role, name in experts.names.items()}
        axes = {"up": "out", "gate": "out", "down": "in"}
        slots = tuple(Slot(role, paths[role], axis, each) for role, axis in axes.items())
        modules = {own: module.get_submodule(own.rpartition(".")[2]) for own in paths.values()}
        found.append(BoundMlp(form, path, module, experts.channels, slots, modules))
    return tuple(found)


def expert_rows(experts: BoundExperts, block: str) -> list[tuple[str, tuple[str, ...], tuple[int, int], int, int]]:
    """(path relative to the block, roles, shape of one, parameters, bytes) of all experts' gates, ups and downs."""
    element = max((p.element_size() for p in experts.module.parameters()), default=0)
    rows: list[tuple[str, tuple[str, ...], tuple[int, int], int, int]] = []
    for role, size in experts.shapes.items():
        path = f"{experts.path.removeprefix(f'{block}.')}.*.{experts.names[role]}"
        count = experts.count * size[0] * size[1]
        rows.append((path, (role, f"{experts.count} experts"), size, count, count * element))
    return rows


def routers_of(spec: Experts, path: str, block: nn.Module) -> tuple[str, ...]:
    """Full paths of the routers that this block has, Linears or modules of their own."""
    present = {name for name, _ in block.named_modules()}
    return tuple(f"{path}.{router}" for router in spec.routers if router in present)
