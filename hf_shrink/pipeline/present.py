"""A plan names modules as they are in the source model; this finds them once whole blocks are gone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from hf_shrink.architectures.binding import Binding, bind
from hf_shrink.architectures.bound import BoundStack
from hf_shrink.plan import Plan, StackPlan
from hf_shrink.surgery import check_plan, remove_blocks

T = TypeVar("T")


@dataclass(frozen=True)
class PresentStack:
    """A stack after whole blocks were removed, and the source index of each block left."""

    stack: BoundStack
    kept: tuple[int, ...]
    plan: StackPlan


def remove_planned_blocks(model: nn.Module, binding: Binding, plan: Plan) -> list[PresentStack]:
    check_plan(binding, plan)
    plans = {s.name: plan.stacks.get(s.name, StackPlan(tuple(range(len(s.blocks))))) for s in binding.stacks}
    for stack in binding.stacks:
        if len(plans[stack.name].kept) < len(stack.blocks):
            remove_blocks(model, stack, plans[stack.name].kept)
    return [PresentStack(stack, plans[stack.name].kept, plans[stack.name]) for stack in bind(model).stacks]


def present_paths(by_path: Mapping[str, T], stacks: Sequence[PresentStack]) -> dict[str, T]:
    """What a plan says of modules, by present path: it names them as in the source, where blocks had other numbers."""
    renamed = {}
    for path, value in by_path.items():
        for s in stacks:
            for block, source in zip(s.stack.blocks, s.kept, strict=True):
                old = f"{s.stack.path}.{source}."
                if path.startswith(old):
                    path = f"{block.path}.{path.removeprefix(old)}"
                    break
            else:
                continue
            break
        renamed[path] = value
    return renamed
