"""What can be done to each part of a model, what that costs and what it damages; from a choice of them to a Plan."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from hf_shrink.errors import RecipeError
from hf_shrink.plan import BlockPlan, Plan, Scheme, StackPlan

Assignment = tuple[int, ...]  # of every group, in their order, the index of the option taken
KEEPS_ALL = BlockPlan()
Place = tuple[int, int]  # index of a group, index of one of its options


@dataclass(frozen=True)
class Cost:
    """What something takes.

    Attributes:
        bytes: in the safetensors files, their headers included.
        cache: bytes that the KV cache takes for one token of context, as if no layer had a window. Not those of cross
            attentions, which are as many as the encoder reads tokens.
        seconds: per token, by purpose ("decode": one token after another; "prefill": the tokens of a prompt at once);
            empty where latency was not measured.
    """

    bytes: int = 0
    cache: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: Cost) -> Cost:
        purposes = {*self.seconds, *other.seconds}
        seconds = {name: self.seconds.get(name, 0.0) + other.seconds.get(name, 0.0) for name in sorted(purposes)}
        return Cost(self.bytes + other.bytes, self.cache + other.cache, seconds)

    def memory(self, context: int) -> int:
        """Bytes of weights and KV cache with `context` tokens in it."""
        return self.bytes + self.cache * context


@dataclass(frozen=True)
class Change:
    """What an option does; the default leaves everything as it is.

    Attributes:
        schemes: by module path in the source model.
        block: what is kept of the block, as far as the option decides it.
        dropped: the whole block goes. The options of all of its groups that say so are linked.
    """

    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    block: BlockPlan = KEEPS_ALL
    dropped: bool = False


@dataclass(frozen=True)
class Option:
    """One thing that can be done to one group.

    Attributes:
        name: to be read, such as "W4 g64", "W4 g64 / W3 g64, 1216 channels", "dropped".
        damage: nats a prediction, predicted: the KL divergence to the dense model that this adds.
        rounding: what of it is that of rounding, by kind of piece ("mlp in"); the rest is that of what goes.
        needs: switches that have to be on where it is taken, see `Problem.switches`.
    """

    name: str
    cost: Cost
    damage: float
    change: Change = field(default_factory=Change)
    needs: tuple[str, ...] = ()
    rounding: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """A decision: exactly one of its options is taken.

    Attributes:
        name: such as "model.layers.3 attention", "model.embed_tokens".
        options: the first one leaves everything as it is.
        stack, block: name of the stack and index of the block that it is about; None of what lies outside.
    """

    name: str
    options: tuple[Option, ...]
    stack: str | None = None
    block: int | None = None


@dataclass(frozen=True)
class Problem:
    """All decisions about one model. What options cost and damage adds up over groups.

    Attributes:
        fixed: what everything that is in no group takes.
        links: options that are taken all or none: those that drop a block, in all of its groups.
        switches: sets of names; of each set exactly one is on. So that blocks agree on what stock transformers reads
            from one config key: options with 1216 channels need "channels 1216".
        base: the plan around the decisions: model type, method, its options, refit, repair.
        depths: how many blocks each stack has, by name.
        staying: name of the stack and index of blocks that cannot go as a whole, whatever is left of them.
    """

    groups: tuple[Group, ...]
    fixed: Cost
    links: tuple[tuple[Place, ...], ...]
    switches: tuple[tuple[str, ...], ...]
    base: Plan
    depths: Mapping[str, int]
    staying: frozenset[tuple[str, int]] = frozenset()

    @property
    def dense(self) -> Cost:
        """What the model takes as it is."""
        return self.cost((0,) * len(self.groups))

    def taken(self, assignment: Sequence[int]) -> Iterator[Option]:
        for group, index in zip(self.groups, assignment, strict=True):
            yield group.options[index]

    def cost(self, assignment: Sequence[int]) -> Cost:
        return sum((option.cost for option in self.taken(assignment)), start=self.fixed)

    def damage(self, assignment: Sequence[int]) -> float:
        """The predicted KL divergence to the dense model, nats a prediction."""
        return math.fsum(option.damage for option in self.taken(assignment))

    def allowed(self, assignment: Sequence[int]) -> bool:
        """Whether links and switches are kept."""
        for link in self.links:
            if len({assignment[group] == option for group, option in link}) > 1:
                return False
        needed = {name for option in self.taken(assignment) for name in option.needs}
        return all(len(needed.intersection(names)) <= 1 for names in self.switches)

    def plan(self, assignment: Sequence[int]) -> Plan:
        """What the assignment does to the model.

        Raises:
            RecipeError: it breaks a link or a switch.
        """
        if not self.allowed(assignment):
            raise RecipeError("this choice of options is not one that the model allows; take it from the solver")
        dropped: dict[str, set[int]] = {}
        blocks: dict[str, dict[int, BlockPlan]] = {}
        schemes: dict[str, Scheme] = {}
        damage: dict[str, float] = {}
        for group, option in zip(self.groups, self.taken(assignment), strict=True):
            schemes |= option.change.schemes
            if option.damage:
                damage[f"{group.name}: {option.name}"] = option.damage
            if group.stack is None or group.block is None:
                continue
            if option.change.dropped:
                dropped.setdefault(group.stack, set()).add(group.block)
            elif not option.change.block.keeps_all:
                own = blocks.setdefault(group.stack, {})
                own[group.block] = _merged(own.get(group.block, BlockPlan()), option.change.block)
        stacks = {}
        for name, index in self._emptied(assignment):  # norms and a number are all that is left: the block goes
            dropped.setdefault(name, set()).add(index)
            blocks[name].pop(index)
        for name, depth in self.depths.items():
            if name in dropped or name in blocks:
                gone = dropped.get(name, set())
                stacks[name] = StackPlan(tuple(i for i in range(depth) if i not in gone), blocks.get(name, {}))
        parts_go = any(block.removed for own in blocks.values() for block in own.values())
        return replace(
            self.base,
            stacks=stacks,
            schemes=schemes,
            damage=damage,
            method=self.base.method if schemes else None,
            transforms=self.base.transforms if schemes else (),
            tune=self.base.tune if schemes else {},
            refit=self.base.refit and any(blocks.values()),
            repair=self.base.repair and (bool(dropped) or parts_go),
        )

    def _emptied(self, assignment: Sequence[int]) -> list[tuple[str, int]]:
        """Blocks that go because all of their parts do, one by one."""
        left: dict[tuple[str, int], bool] = {}
        for group, option in zip(self.groups, self.taken(assignment), strict=True):
            if group.stack is not None and group.block is not None:
                key = group.stack, group.block
                left[key] = left.get(key, False) or not option.change.block.removed
        return [key for key, some in left.items() if not some and key not in self.staying]


def _merged(one: BlockPlan, other: BlockPlan) -> BlockPlan:
    """Both, which decide different things; of parts that go, all."""
    decided: dict[str, Any] = {f.name: v for f in fields(other) if (v := getattr(other, f.name)) is not None}
    if one.removed and other.removed:
        decided["removed"] = (*one.removed, *other.removed)
    return replace(one, **decided)
