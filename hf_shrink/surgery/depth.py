"""Take whole blocks out of a stack, or parts out of a block, for good or for a measurement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from hf_shrink.architectures.absent import PARTS, take_parts
from hf_shrink.architectures.bound import BoundBlock, BoundMlp, BoundStack
from hf_shrink.architectures.portable import stack_config
from hf_shrink.errors import ArchitectureError
from hf_shrink.registry import did_you_mean
from hf_shrink.surgery.checks import check_units


@contextmanager
def without_blocks(model: nn.Module, stack: BoundStack, removed: Sequence[int]) -> Iterator[None]:
    """The model with some of a stack's blocks taken out, for measurements; put back afterwards. Use no KV cache."""
    modules = model.get_submodule(stack.path)
    assert isinstance(modules, nn.ModuleList)
    owner = model.get_submodule(stack.path.rpartition(".")[0])
    gone = set(removed)
    kept = [block.index for block in stack.blocks if block.index not in gone]
    undo = _DepthConfig(model, stack, kept)
    setattr(owner, stack.path.rpartition(".")[2], nn.ModuleList(modules[i] for i in kept))
    undo.apply()
    try:
        yield
    finally:
        setattr(owner, stack.path.rpartition(".")[2], modules)
        undo.revert()


def remove_blocks(model: nn.Module, stack: BoundStack, kept: Sequence[int]) -> None:
    """Keep only the given blocks of a stack, renumber them, and set the config's depth. The binding is stale after."""
    check_blocks(stack, kept)
    owner = model.get_submodule(stack.path.rpartition(".")[0])
    modules = model.get_submodule(stack.path)
    assert isinstance(modules, nn.ModuleList)
    setattr(owner, stack.path.rpartition(".")[2], nn.ModuleList(modules[i] for i in kept))
    _DepthConfig(model, stack, kept).apply()
    for new, old in enumerate(kept):
        for module in modules[old].modules():
            if getattr(module, "layer_idx", None) == old:
                module.layer_idx = new  # type: ignore[assignment]
            if getattr(module, "layer_id", None) == old:
                module.layer_id = new  # type: ignore[assignment]


def check_blocks(stack: BoundStack, kept: Sequence[int]) -> None:
    """Raises ArchitectureError where a stack cannot keep these blocks and no others."""
    check_units(kept, len(stack.blocks), stack.path, "blocks")
    if stack.spec is None:
        raise ArchitectureError(f"blocks of {stack.path} cannot be removed: its config keys are not in the table")
    if stack.spec.depth_fixed is not None and len(kept) != len(stack.blocks):
        raise ArchitectureError(f"blocks of {stack.path} cannot be removed: {stack.spec.depth_fixed}")
    if stack.spec.first_is_special and kept[0] != 0:
        raise ArchitectureError(f"{stack.path}: the first block is built differently and must be kept")


def remove_parts(stack: BoundStack, block: BoundBlock, parts: Sequence[str]) -> None:
    """Take an attention or an MLP out of a block, with stand-ins in its place. The binding is stale afterwards.

    Raises:
        ArchitectureError: the block has no such part, or cannot do without it.
    """
    for part in parts:
        check_part(stack, block, part)
    if parts and stack.spec is not None:
        take_parts(block.module, stack.spec, parts)


def check_part(stack: BoundStack, block: BoundBlock, part: str) -> None:
    """Raises ArchitectureError where a block cannot do without a part, or there is none of that name."""
    if part not in PARTS:
        raise ArchitectureError(f"no part of {block.path} is called {part!r}; {did_you_mean(part, PARTS)}")
    if stack.spec is None:
        raise ArchitectureError(f"parts of {block.path} cannot be removed: its roles are not in the table")
    if (reason := why_part_stays(block, part)) is not None:
        raise ArchitectureError(f"the {part.replace('_', ' ')} of {block.path} cannot be removed: {reason}")


def writes_cache(model: nn.Module, stack: BoundStack) -> bool:
    """Whether the stack's blocks write a KV cache, by the family's table or by what its config makes of it."""
    if stack.spec is None:
        return False
    return stack.spec.cached or bool(getattr(stack_configs(model, stack)[0], "is_decoder", False))


def why_part_stays(block: BoundBlock, part: str) -> str | None:
    """Why a block cannot do without a part; None when it can. Whether a KV cache needs it is not asked here."""
    bound = getattr(block, part, None)
    if bound is None:
        return "the block has none of known form"
    if isinstance(bound, BoundMlp) and block.experts is not None:
        return "it runs beside a mixture of experts"
    whole: str | None = bound.spec.whole
    return whole


class _DepthConfig:
    """The config keys that depend on the number of blocks, on every config object of the model that has them."""

    def __init__(self, model: nn.Module, stack: BoundStack, kept: Sequence[int]) -> None:
        assert stack.spec is not None
        spec = stack.spec
        self._old: list[tuple[PretrainedConfig, str, Any]] = []
        self._new: list[tuple[PretrainedConfig, str, Any]] = []
        total = len(stack.blocks)
        for place, config in enumerate(stack_configs(model, stack)):
            # In a stack's own copy the usual key counts its blocks too (T5 sizes the decoder's KV cache by it).
            depths = (spec.depth, "num_hidden_layers") if place else (spec.depth,)
            for key in dict.fromkeys((*depths, *spec.block_lists)):
                value = getattr(config, key, None)
                if isinstance(value, list | tuple) and len(value) == total:
                    self._change(config, key, value, [value[i] for i in kept])
                elif key in depths and value == total:
                    self._change(config, key, value, len(kept))

    def _change(self, config: PretrainedConfig, key: str, old: Any, new: Any) -> None:
        self._old.append((config, key, old))
        self._new.append((config, key, new))

    def apply(self) -> None:
        for config, key, value in self._new:
            setattr(config, key, value)

    def revert(self) -> None:
        for config, key, value in self._old:
            setattr(config, key, value)


def stack_configs(model: nn.Module, stack: BoundStack) -> list[PretrainedConfig]:
    """The stack's own config first, then copies of it that modules hold (T5 gives each stack a copy)."""
    config: Any = model.config
    if stack.spec is not None:
        config = stack_config(config, stack.spec)
    found = [config]
    for name, module in model.named_modules():
        other = getattr(module, "config", None)
        inside = (stack.path + ".").startswith(name + ".") or name.startswith(stack.path + ".") or not name
        if inside and type(other) is type(config) and all(other is not c for c in found):
            found.append(other)
    return found


def layer_types(model: nn.Module, stack: BoundStack) -> list[Any]:
    """What kind of layer each block is by the config, such as "sliding_attention"; None where it does not say."""
    types: Any = getattr(stack_configs(model, stack)[0], "layer_types", None)
    known = isinstance(types, list | tuple) and len(types) == len(stack.blocks)
    return list(types) if known else [None] * len(stack.blocks)
