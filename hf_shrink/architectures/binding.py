"""Find a model's blocks and their roles: from the table of families, else by transformers' conventions, verified.

Where neither knows them, blocks are found by search, for quantization only.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from hf_shrink.architectures import families
from hf_shrink.architectures.base import Family, Stack
from hf_shrink.architectures.bound import BoundBlock, BoundStack
from hf_shrink.architectures.declared import bind_stack
from hf_shrink.architectures.derive import Derived, derive
from hf_shrink.architectures.search import find_stacks, find_towers
from hf_shrink.errors import ArchitectureError

Source = Literal["table", "convention"]


@functools.cache
def known_families() -> dict[str, Family]:
    """Every declared family by model type."""
    table: dict[str, Family] = {}
    for info in pkgutil.iter_modules(families.__path__):
        module = importlib.import_module(f"{families.__name__}.{info.name}")
        for family in module.FAMILIES:
            for model_type in family.model_types:
                if model_type in table:
                    raise ValueError(f"model type {model_type!r} is declared twice")
                table[model_type] = family
    return table


@dataclass(frozen=True)
class Binding:
    """A model's stacks with their roles.

    Attributes:
        family: None when neither the table nor the conventions know the roles: such a model can only be quantized.
        towers: rows of blocks that feed the stacks (image encoders), in the model's order; no part of `stacks`.
        source: where the family comes from.
        missing: why parts have no roles, where the model type is not in the table.
    """

    model_type: str
    family: Family | None
    stacks: tuple[BoundStack, ...]
    towers: tuple[BoundStack, ...] = ()
    source: Source | None = None
    missing: tuple[str, ...] = ()

    @property
    def blocks(self) -> list[BoundBlock]:
        return [block for stack in self.stacks for block in stack.blocks]

    @property
    def depths(self) -> dict[str, int]:
        """How many blocks stacks have, by name, and towers, by path."""
        return {stack.name: len(stack.blocks) for stack in (*self.towers, *self.stacks)}

    def stack(self, name: str) -> BoundStack:
        for stack in self.stacks:
            if stack.name == name:
                return stack
        raise ArchitectureError(f"this model has no stack {name!r}; it has {', '.join(s.name for s in self.stacks)}")

    def require_roles(self) -> Family:
        """The family. Raises ArchitectureError naming the missing roles when there is none."""
        if self.family is None:
            raise ArchitectureError(
                f"model type {self.model_type!r} has no role table, and its roles query, key, value, output, up and "
                f"down could not be found and verified ({'; '.join(self.missing) or 'not a transformers model'}), so "
                "nothing can be pruned; quantization works without. To add it, write one entry in "
                "hf_shrink/architectures/families/ (see CONTRIBUTING.md)"
            )
        return self.family


def bind(model: nn.Module) -> Binding:
    """Resolve the roles of a model's blocks.

    Raises:
        ArchitectureError: no repeated blocks were found, or a declared path or shape does not match the model.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    family = _declared(model)
    binding = Binding(model_type, None, ())
    if family is not None:
        specs = _applying(family, getattr(model, "config", None))
        stacks = [bound for spec in specs if (bound := bind_stack(model, spec)) is not None]
        binding = Binding(model_type, family, tuple(stacks), tuple(find_towers(model, family.towers)), "table")
    elif isinstance(model, PreTrainedModel):
        binding = _bind_derived(model, model_type, _derived(model))
    if binding.family is None:
        binding = Binding(model_type, None, tuple(find_stacks(model)), missing=binding.missing)
    if not binding.stacks:
        raise ArchitectureError(
            f"no repeated blocks were found in {type(model).__name__} (model type {model_type!r}); "
            "hf_shrink works on models made of a list of transformer blocks"
        )
    return binding


def family_of(model: nn.Module) -> Family | None:
    """The family of a model that has roles, from the table or derived; None for one that can be quantized only."""
    family = _declared(model)
    return family if family is not None or not isinstance(model, PreTrainedModel) else _derived(model).family


def same_family(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Let `other`, made from the config that `model` has by now, have the roles that `model` had before it was cut."""
    if _DERIVED in vars(model):
        vars(other)[_DERIVED] = vars(model)[_DERIVED]


_DERIVED = "_derived_family"  # on the model: what it was derived to be as it came


def _derived(model: PreTrainedModel) -> Derived:
    if _DERIVED not in vars(model):
        vars(model)[_DERIVED] = derive(model)
    found: Derived = vars(model)[_DERIVED]
    return found


def _bind_derived(model: PreTrainedModel, model_type: str, derived: Derived) -> Binding:
    if derived.family is None:
        return Binding(model_type, None, (), missing=derived.reasons)
    try:
        stacks = [bound for spec in derived.family.stacks if (bound := bind_stack(model, spec)) is not None]
    except ArchitectureError as error:  # its sizes do not fit what a small copy of it was found to be
        vars(model)[_DERIVED] = Derived(None, (str(error),))
        return Binding(model_type, None, (), missing=(str(error),))
    return Binding(model_type, derived.family, tuple(stacks), source="convention", missing=derived.reasons)


def _declared(model: nn.Module) -> Family | None:
    """The family in the table, where one of its declarations is of a model with this config."""
    config = getattr(model, "config", None)
    family = known_families().get(getattr(config, "model_type", type(model).__name__))
    return family if family is not None and _applying(family, config) else None


def _applying(family: Family, config: object) -> list[Stack]:
    """For each stack of the family, the first declaration whose conditions the config meets."""
    chosen: dict[str, Stack] = {}
    for spec in family.stacks:
        owner = config
        for part in spec.config.split(".") if spec.config else ():
            owner = getattr(owner, part, None)
        if all(getattr(owner, key, None) == value for key, value in spec.when.items()):
            chosen.setdefault(spec.name, spec)
    return list(chosen.values())
