"""The stacks of a model once a plan's blocks are out, and where the modules are then that the plan names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import nn

from hf_shrink.architectures.binding import Binding, bind
from hf_shrink.architectures.bound import BoundBlock, BoundStack
from hf_shrink.plan import BlockPlan, Plan, StackPlan
from hf_shrink.surgery import check_plan, remove_blocks, remove_parts

T = TypeVar("T")


@dataclass(frozen=True)
class KeptStack:
    """A stack without its removed blocks and parts, the source index of each block left, and what is left to do."""

    stack: BoundStack
    kept: tuple[int, ...]
    plan: StackPlan


def whole_stack(stack: BoundStack) -> KeptStack:
    """A stack that loses no blocks."""
    kept = tuple(range(len(stack.blocks)))
    return KeptStack(stack, kept, StackPlan(kept))


def remove_planned(model: nn.Module, binding: Binding, plan: Plan) -> list[KeptStack]:
    """Take out the blocks and parts that the plan removes, in place; the stacks left. Raises as `check_plan`."""
    check_plan(model, plan)
    plans = {s.name: plan.stacks.get(s.name, StackPlan(tuple(range(len(s.blocks))))) for s in binding.stacks}
    for stack in binding.stacks:
        for index, block in plans[stack.name].blocks.items():
            remove_parts(stack, stack.blocks[index], block.removed or ())
        if len(plans[stack.name].kept) < len(stack.blocks):
            remove_blocks(model, stack, plans[stack.name].kept)
    done = {
        name: replace(p, blocks={i: replace(b, removed=None) for i, b in p.blocks.items()}) for name, p in plans.items()
    }
    return [KeptStack(stack, done[stack.name].kept, done[stack.name]) for stack in bind(model).stacks]


def present(by_path: Mapping[str, T], stacks: Sequence[KeptStack]) -> dict[str, T]:
    """What a plan says of modules, by the path that they end up with: it names them as in the source, where blocks and
    experts had other numbers."""
    renamed = {}
    for path, value in by_path.items():
        for s in stacks:
            for block, source in zip(s.stack.blocks, s.kept, strict=True):
                old = f"{s.stack.path}.{source}."
                if path.startswith(old):
                    path = _expert_renumbered(
                        f"{block.path}.{path.removeprefix(old)}", block, s.plan.blocks.get(source)
                    )
                    break
            else:
                continue
            break
        renamed[path] = value
    return renamed


def _expert_renumbered(path: str, block: BoundBlock, plan: BlockPlan | None) -> str:
    """The path of a matrix once the block's removed experts are gone."""
    if block.experts is None or plan is None or plan.experts is None:
        return path
    start = f"{block.experts.path}."
    number, dot, rest = path.removeprefix(start).partition(".")
    if not path.startswith(start) or not dot:
        return path
    return f"{start}{plan.experts.index(int(number))}.{rest}"
