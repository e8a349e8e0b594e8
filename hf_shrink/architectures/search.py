"""Find the blocks of a model without a table."""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_shrink.architectures.bound import BoundBlock, BoundStack
from hf_shrink.architectures.linears import is_matrix


def find_towers(model: nn.Module, names: tuple[str, ...]) -> list[BoundStack]:
    """The rows of blocks inside the modules that a family's `towers` name."""
    towers = []
    for path, module in model.named_modules():
        if any(path == name or path.endswith("." + name) for name in names):
            towers += find_stacks(module, path)
    return towers


def find_stacks(model: nn.Module, prefix: str = "") -> list[BoundStack]:
    """Outermost lists of blocks, found without a table: no matrix has a role. `prefix`: the model's path."""
    stacks: list[BoundStack] = []
    for path, modules in model.named_modules(prefix=prefix):
        if not isinstance(modules, nn.ModuleList) or any(path.startswith(s.path + ".") for s in stacks):
            continue
        children = list(modules)
        same = len({type(child) for child in children}) == 1
        blocky = all(isinstance(child, GradientCheckpointingLayer) for child in children)
        inside = [any(is_matrix(m) for n, m in child.named_modules() if n) for child in children]
        if not children or not all(inside) or not (blocky or (same and len(children) > 1)):
            continue
        blocks = []
        for index, child in enumerate(children):
            roles = {f"{path}.{index}.{n}": () for n, m in child.named_modules() if is_matrix(m)}
            blocks.append(BoundBlock(f"{path}.{index}", index, child, None, None, None, dict(roles)))
        stacks.append(BoundStack(path, path, tuple(blocks), None))
    return stacks
