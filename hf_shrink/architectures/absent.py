"""What stands where a part of a block was taken out: modules that add nothing, and that a block can go on calling.

A part (attention or MLP) goes with all of its matrices; the block keeps its form, its norms, its number and its place
in a KV cache. The bias of the matrix that wrote the part's output stays: it is what the part adds without units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_shrink.architectures.base import Attention, Mlp, Stack
from hf_shrink.architectures.linears import shape

Part = Literal["attention", "cross_attention", "mlp"]
PARTS: tuple[Part, ...] = ("attention", "cross_attention", "mlp")


class AbsentMatrix(nn.Module):
    """In the place of a matrix whose inputs are gone: zeros, and the bias.

    Attributes:
        weight: one number in the matrix's dtype, which is never read. It tells who asks for the dtype, and because it
            has another shape stock transformers refuses to load it.
    """

    def __init__(self, out_features: int, weight: Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features = out_features
        self.weight = nn.Parameter(torch.zeros(1, dtype=weight.dtype, device=weight.device), requires_grad=False)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        output = x.new_zeros(*x.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias


class NoRows(nn.Module):
    """In the place of a matrix whose outputs are gone: (..., 0).

    Attributes:
        weight, bias: for those who ask for them (`_init_weights` of some families); never read, never saved.
    """

    bias: None = None

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        unused = torch.zeros(1, dtype=weight.dtype, device=weight.device)
        self.register_buffer("weight", unused, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.new_empty(*x.shape[:-1], 0)


class AbsentAttention(nn.Module):
    """In the place of an attention: it reads no other token and leaves a KV cache alone.

    Args:
        output: what is left of its output matrix, and the path of that inside it; None where it lies outside.
        returns: what comes back behind the output: the argument of that name, or None.
    """

    def __init__(self, output: AbsentMatrix | None, path: str, returns: Sequence[str | None]) -> None:
        super().__init__()
        self._path = path if output is not None else ""
        self._returns = tuple(returns)
        owner: nn.Module = self
        *parents, name = path.split(".")
        for parent in parents if output is not None else ():
            owner.add_module(parent, nn.Module())
            owner = owner.get_submodule(parent)
        if output is not None:
            owner.add_module(name, output)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        output = self.get_submodule(self._path)(hidden_states) if self._path else torch.zeros_like(hidden_states)
        return output, *(kwargs.get(name) if name is not None else None for name in self._returns)


def is_absent(block: nn.Module, spec: Attention | Mlp) -> bool:
    """Whether the part was taken out of the block."""
    path, kind = (spec.module, AbsentAttention) if isinstance(spec, Attention) else (spec.down, AbsentMatrix)
    return any(name == path and isinstance(module, kind) for name, module in block.named_modules())


def take_out(block: nn.Module, spec: Attention | Mlp) -> Callable[[], None]:
    """Put stand-ins where a part's modules are, in place; returns what puts the part back."""
    if isinstance(spec, Mlp):
        rows = [path for path in (spec.gate, spec.up) if path is not None]
        inner: dict[str, nn.Module] = {path: NoRows(_weight(block.get_submodule(path))) for path in rows}
        return _swap(block, {**inner, spec.down: _absent(block.get_submodule(spec.down))})
    output = _absent(block.get_submodule(spec.output))
    inside = spec.output.startswith(spec.module + ".")
    if inside:
        path = spec.output.removeprefix(spec.module + ".")
        return _swap(block, {spec.module: AbsentAttention(output, path, spec.returns)})
    return _swap(block, {spec.module: AbsentAttention(None, "", spec.returns), spec.output: output})


def take_parts(block: nn.Module, stack: Stack, parts: Sequence[str]) -> Callable[[], None]:
    """As `take_out`, of several parts by name; an MLP in the form that the block has."""
    undo = [take_out(block, form) for part in parts if (form := part_of(block, stack, part)) is not None]

    def put_back() -> None:
        for step in reversed(undo):
            step()

    return put_back


def part_of(block: nn.Module, stack: Stack, part: str) -> Attention | Mlp | None:
    """What is declared of a part, in the form that the block has; None where it has none."""
    declared = getattr(stack, part)
    forms = declared if isinstance(declared, tuple) else (declared,)
    present = {name for name, _ in block.named_modules()}
    for form in forms:
        if isinstance(form, Attention) and form.module in present:
            return form
        if isinstance(form, Mlp) and all(p in present for p in (form.up, form.down, form.gate) if p is not None):
            return form
    return None


@contextmanager
def without_parts(takings: Sequence[tuple[nn.Module, Stack, Sequence[str]]]) -> Iterator[None]:
    """Blocks without some parts, for measurements; put back afterwards."""
    undo: list[Callable[[], None]] = []
    try:
        for block, stack, parts in takings:
            undo.append(take_parts(block, stack, parts))
        yield
    finally:
        for step in reversed(undo):
            step()


def _absent(module: nn.Module) -> AbsentMatrix:
    bias = module.bias
    return AbsentMatrix(shape(module)[0], _weight(module), bias if isinstance(bias, nn.Parameter) else None)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _swap(block: nn.Module, new: dict[str, nn.Module]) -> Callable[[], None]:
    old = {path: block.get_submodule(path) for path in new}

    def put(modules: dict[str, nn.Module]) -> None:
        for path, module in modules.items():
            owner, _, name = path.rpartition(".")
            setattr(block.get_submodule(owner), name, module)

    for path, module in new.items():
        module.train(old[path].training)
    put(new)
    return lambda: put(old)
