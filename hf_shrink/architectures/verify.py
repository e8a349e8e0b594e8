"""Whether a declaration is right, by numbers: a unit cut equals a unit masked, a block removed equals a block skipped.

Everything is tried on a narrow copy of the model with random weights (`tiny.py`, `probe.py`), of all of its blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_shrink.architectures.absent import take_parts
from hf_shrink.architectures.base import Stack
from hf_shrink.architectures.bound import BoundAttention, BoundMlp, BoundStack
from hf_shrink.architectures.declared import bind_stack
from hf_shrink.architectures.linears import cut, matrix
from hf_shrink.architectures.portable import stack_config
from hf_shrink.architectures.probe import TOLERANCE, VISIBLE, Inputs, ProbeError, build, difference, outputs
from hf_shrink.architectures.tiny import rebuilt
from hf_shrink.errors import ArchitectureError

READERS: dict[type, str] = {BoundAttention: "output", BoundMlp: "down"}  # the roles that read units
Part = BoundAttention | BoundMlp
Keep = Callable[[Part, int], Sequence[int]]  # the units of a part to keep, in the block of that number


@dataclass(frozen=True)
class Probe:
    """A tiny model, what it reads, and what it says."""

    model: PreTrainedModel
    inputs: Inputs
    dense: list[Tensor]

    def judge(self, found: list[Tensor], expected: list[Tensor], what: str) -> str | None:
        """Why `found` does not show that something is right; None where it does."""
        if difference(expected, self.dense) < VISIBLE:
            return f"{what} changes nothing that could be seen"
        off = difference(found, expected)
        return None if off <= TOLERANCE else f"{what} changes the outputs (by {off:.1e} of the largest)"


def parts_of(stack: BoundStack, name: str) -> Iterator[tuple[int, Part]]:
    """The parts `attention`, `cross_attention` or `mlp` of a stack's blocks, with the blocks' numbers."""
    for block in stack.blocks:
        part = getattr(block, name)
        if part is not None:
            yield block.index, part


def some_units(part: Part, block: int) -> Sequence[int]:
    """Other units in every block, and other numbers of them."""
    if isinstance(part, BoundMlp):
        step = 7 if block % 2 else 5
        return [c for c in range(part.channels) if (c + block) % step != 3]
    groups, each = part.kv_heads, part.heads_per_group
    gone_groups = {block % groups} if groups > 1 and (block % 2 == 0 or each == 1) else set()
    if groups > 2 and block % 2:
        gone_groups.add((block + 1) % groups)
    gone_head = block % each if each > 1 and (block % 2 or not gone_groups) else None
    return [h for h in range(part.heads) if h // each not in gone_groups and h % each != gone_head]


def check_width(probe: Probe, spec: Stack, name: str) -> str | None:
    """Why units of the parts `name` cannot be cut as `spec` says; None when cutting equals masking."""
    what = "cutting " + ("channels" if name == "mlp" else "heads")
    try:
        with _masked(probe.model, spec, name, some_units):
            expected = outputs(probe.model, probe.inputs)
        found = outputs(cut_model(probe.model, spec, name, some_units), probe.inputs)
    except (ArchitectureError, ProbeError) as error:
        return f"{what}: {error}"
    return probe.judge(found, expected, what)


def check_absence(probe: Probe, spec: Stack, name: str) -> str | None:
    """Why the parts `name` cannot be taken out of all blocks but the first; None when that equals masking them."""
    what = f"taking out {name.replace('_', ' ')}"

    def kept(part: Part, block: int) -> Sequence[int]:
        return () if block else range(len(part.slot(READERS[type(part)]).index))

    try:
        with _masked(probe.model, spec, name, kept):
            expected = outputs(probe.model, probe.inputs)
        smaller = copy.deepcopy(probe.model)
        for block in _bound(smaller, spec).blocks[1:]:
            if getattr(block, name) is not None:
                take_parts(block.module, spec, [name])
        return probe.judge(outputs(smaller, probe.inputs), expected, what)
    except (ArchitectureError, ProbeError) as error:
        return f"{what}: {error}"


def cut_model(model: PreTrainedModel, spec: Stack, name: str, keep: Keep) -> PreTrainedModel:
    """A copy without the units that are not kept."""
    smaller = copy.deepcopy(model)
    for block, part in parts_of(_bound(smaller, spec), name):
        _cut(part, keep(part, block))
    return smaller


def _cut(part: Part, kept: Sequence[int]) -> None:
    cuts = part.cuts(kept)
    for path, module in part.modules.items():
        rows, columns = cuts.get((path, "out")), cuts.get((path, "in"))
        if rows is not None or columns is not None:
            cut(module, rows, columns)
    for attribute, quantity in part.spec.attributes.items():
        if isinstance(part, BoundMlp):
            setattr(part.module, attribute, len(kept))
        else:
            setattr(part.module, attribute, part.quantity(quantity, len(kept), len(part.groups_of(kept))))


def _bound(model: nn.Module, spec: Stack) -> BoundStack:
    bound = bind_stack(model, spec)
    if bound is None:
        raise ArchitectureError(f"there are no blocks at {spec.blocks}")
    return bound


@contextmanager
def _masked(model: nn.Module, spec: Stack, name: str, keep: Keep) -> Iterator[None]:
    """The model with zero columns where other matrices read the units that are not kept."""
    undo: list[tuple[Tensor, Tensor]] = []
    for block, part in parts_of(_bound(model, spec), name):
        slot = part.slot(READERS[type(part)])
        weight = matrix(part.modules[slot.path])
        undo.append((weight, weight.clone()))
        kept = set(keep(part, block))
        weight[:, slot.positions([u for u in range(len(slot.index)) if u not in kept])] = 0
    try:
        yield
    finally:
        for weight, old in reversed(undo):
            weight.copy_(old)


def same_as_stock(
    probe: Probe, smaller: dict[str, Tensor], config: PretrainedConfig, expected: list[Tensor], what: str
) -> str | None:
    """Why the stock class does not compute `expected` with this state and config; None when it does."""
    kind = type(probe.model)
    try:
        again = rebuilt(config)
        shapes = {name: tensor.shape for name, tensor in build(kind, again, meta=True).state_dict().items()}
        if shapes != {name: tensor.shape for name, tensor in smaller.items()}:
            return f"{what}: the config has no key for it"
        stock = build(kind, again)
        stock.load_state_dict(smaller)
        found = outputs(stock, probe.inputs)
    except (ProbeError, StrictDataclassError, ValueError, TypeError, KeyError) as error:
        return f"{what}: {error}"
    return probe.judge(found, expected, what)


def check_removal(probe: Probe, spec: Stack, removed: Sequence[int]) -> str | None:
    """Why these blocks cannot be removed by the keys of `spec`; None when it equals skipping them.

    Tried in the model as it is, and in a stock one made from the config as it would be saved.
    """
    what = f"removing block{'s' if len(removed) > 1 else ''} {', '.join(map(str, removed))}"
    bound = _bound(probe.model, spec)
    kept = [block.index for block in bound.blocks if block.index not in removed]
    try:
        with skipped(bound, removed):
            expected = outputs(probe.model, probe.inputs)
        config = copy.deepcopy(probe.model.config)
        set_depth(stack_config(config, spec), spec, len(bound.blocks), kept)
        state = _renumbered(probe.model.state_dict(), bound.path, kept)
        reason = same_as_stock(probe, state, config, expected, what)
        if reason is not None:
            return reason
        live = copy.deepcopy(probe.model)
        owner, _, attribute = bound.path.rpartition(".")
        modules: Any = live.get_submodule(bound.path)
        setattr(live.get_submodule(owner), attribute, nn.ModuleList(modules[i] for i in kept))
        for other in _configs(live, stack_config(live.config, spec)):
            set_depth(other, spec, len(bound.blocks), kept)
        return probe.judge(outputs(live, probe.inputs), expected, what)
    except ProbeError as error:
        return f"{what}: {error}"


def set_depth(config: PretrainedConfig, spec: Stack, total: int, kept: Sequence[int]) -> None:
    """Let a config say a smaller number of blocks, in the key and the lists that `spec` names."""
    for key in spec.block_lists:
        value = getattr(config, key, None)
        if isinstance(value, list | tuple) and len(value) == total:
            setattr(config, key, type(value)(value[i] for i in kept))
    if getattr(config, spec.depth, None) == total:
        setattr(config, spec.depth, len(kept))


def _configs(model: nn.Module, own: PretrainedConfig) -> list[PretrainedConfig]:
    """The config, and copies of it that modules hold."""
    found = [own]
    for module in model.modules():
        other = getattr(module, "config", None)
        if type(other) is type(own) and all(other is not known for known in found):
            found.append(other)
    return found


def _renumbered(state: dict[str, Tensor], path: str, kept: Sequence[int]) -> dict[str, Tensor]:
    numbers = {old: new for new, old in enumerate(kept)}
    renamed = {}
    for name, tensor in state.items():
        if not name.startswith(f"{path}."):
            renamed[name] = tensor
            continue
        number, _, rest = name[len(path) + 1 :].partition(".")
        if int(number) in numbers:
            renamed[f"{path}.{numbers[int(number)]}.{rest}"] = tensor
    return renamed


@contextmanager
def skipped(stack: BoundStack, removed: Sequence[int]) -> Iterator[None]:
    """The model with blocks that hand on what they get."""
    blocks = [stack.blocks[index].module for index in removed]
    for module in blocks:
        vars(module)["forward"] = _pass(module.forward)
    try:
        yield
    finally:
        for module in blocks:
            del vars(module)["forward"]


def _pass(real: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs.get("hidden_states")
        given = next(v for v in kwargs.values() if isinstance(v, Tensor)) if given is None else given
        found = real(*args, **kwargs)
        return (given, *found[1:]) if isinstance(found, tuple) else given

    return forward
