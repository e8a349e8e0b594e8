"""Experts taken apart: one Linear a matrix, under the names of the original checkpoint, in place of 3D parameters.

What quantizes, packs, saves and loads Linears then does so for every expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from hf_shrink.architectures.binding import Binding, bind, known_families
from hf_shrink.architectures.bound import BoundExperts


class Watch:
    """What the experts of a block get of one batch, noted while the block runs in `watching`.

    Attributes:
        inputs: by module, every expert's input (tokens it got, width), gathered when asked for; padding left out.
        middle: the same for what every expert's `down` gets (tokens it got, channels).
        counts: by module, int64 (experts,), the tokens that each expert got.
        routed: by module, float64 (2, experts), sums over each expert's tokens: of the router's weight, and of that
            weight times the L2 norm of the expert's output.
    """

    def __init__(self, real: Tensor | None) -> None:
        self._real = real
        self.inputs: dict[nn.Module, Callable[[int], Tensor]] = {}
        self.middle: dict[nn.Module, Sequence[Tensor]] = {}
        self.counts: dict[nn.Module, Tensor] = {}
        self.routed: dict[nn.Module, Tensor] = {}

    def without_padding(self, index: Tensor, none: int) -> Tensor:
        """Indices (tokens, experts of a token) with `none` for tokens that are padding."""
        if self._real is None or self._real.numel() != len(index):
            return index
        return index.masked_fill(~self._real.reshape(-1, 1).to(index.device), none)


# Of the running thread or greenlet: the batches of a walk take turns inside a block.
_WATCH: ContextVar[Watch | None] = ContextVar("hf_shrink_watch", default=None)


@contextmanager
def watching(real: Tensor | None) -> Iterator[Watch]:
    """Let experts run for calibration: on real tokens only, each of them even without any, noted in the Watch.

    Padding gets nothing from the experts meanwhile. No real token sees the difference: none attends to padding.

    Args:
        real: bool (batch, sequence) of the tokens that are not padding; None: all of them.
    """
    watch = Watch(real)
    token = _WATCH.set(watch)
    try:
        yield watch
    finally:
        _WATCH.reset(token)
        watch.inputs.clear()
        watch.middle.clear()


class SeparateExperts(nn.Module):
    """The experts of one block as children "0", "1", ..., each with its three Linears.

    Computes what the module that it replaces does in eager mode: experts add up in ascending order.
    """

    def __init__(self, experts: Sequence[nn.Module], names: dict[str, str], activation: Callable[[Tensor], Tensor]):
        super().__init__()
        for index, expert in enumerate(experts):
            self.add_module(str(index), expert)
        self.middle = nn.Identity()  # sees the inputs of all `down`s in one tensor, which may then be put away
        self.names = dict(names)
        self.act_fn = activation
        self.num_experts = len(experts)

    @classmethod
    def from_bound(cls, bound: BoundExperts) -> SeparateExperts:
        """From 3D parameters. The Linears' weights are views of these: nothing is copied."""
        spec, fused = bound.spec, bound.module
        gate_up, down = fused.get_parameter(spec.fused), fused.get_parameter(spec.down_fused)
        channels = bound.shapes["gate"][0]
        experts = []
        for index in range(bound.count):
            both = gate_up.data[index]
            weights = {"gate": both[:channels], "up": both[channels:], "down": down.data[index]}
            expert = nn.Module()
            for role, name in bound.names.items():
                expert.add_module(name, _linear(weights[role], gate_up.requires_grad))
            experts.append(expert)
        separate = cls(experts, bound.names, getattr(fused, spec.activation))
        return separate.train(fused.training)

    def matrix(self, expert: int, role: str) -> nn.Module:
        """An expert's gate, up or down."""
        return self.get_submodule(f"{expert}.{self.names[role]}")

    def keep(self, experts: Sequence[int]) -> None:
        """Leave only some experts, renumbered from 0 in the order given."""
        kept = [self.get_submodule(str(index)) for index in experts]
        for index in range(self.num_experts):
            delattr(self, str(index))
        middle = self._modules.pop("middle")
        for index, expert in enumerate(kept):
            self.add_module(str(index), expert)
        self.add_module("middle", middle)
        self.num_experts = len(kept)

    def write_into(self, bound: BoundExperts) -> None:
        """Put the weights back into the 3D parameters that they were taken from; nothing moves where they are views.

        Where experts, or channels of theirs, were removed since, these parameters are made anew, and what counts them
        is set.
        """
        fused, weight = bound.module, self.matrix(0, "down").weight
        assert isinstance(weight, Tensor)
        width, channels = weight.shape
        if (self.num_experts, channels) != (bound.count, bound.channels):
            sizes = {bound.spec.fused: (2 * channels, width), bound.spec.down_fused: (width, channels)}
            for name, size in sizes.items():
                old = fused.get_parameter(name)
                new = old.data.new_empty(self.num_experts, *size)
                setattr(fused, name, nn.Parameter(new, requires_grad=old.requires_grad))
            counts = {"experts": self.num_experts, "channels": channels}
            for attribute, quantity in bound.spec.attributes.items():
                name = attribute.rpartition(".")[2]
                if quantity in counts and hasattr(fused, name):
                    setattr(fused, name, counts[quantity])
        gate_up, down = fused.get_parameter(bound.spec.fused), fused.get_parameter(bound.spec.down_fused)
        for index in range(self.num_experts):
            both = gate_up.data[index]
            places = {"gate": both[:channels], "up": both[channels:], "down": down.data[index]}
            for role, place in places.items():
                weight = self.matrix(index, role).weight
                assert isinstance(weight, nn.Parameter)
                if weight.data_ptr() != place.data_ptr():
                    place.copy_(weight.data)

    def own_weights(self) -> None:
        """Give every weight that is still a part of a larger tensor memory of its own."""
        for parameter in self.parameters():
            if parameter.untyped_storage().nbytes() > parameter.nbytes:
                parameter.data = parameter.data.clone()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As the module that it replaces.

        Args:
            hidden_states: (tokens, width).
            top_k_index: int64 (tokens, k), the experts of each token; `num_experts` means none.
            top_k_weights: (tokens, k).
        """
        watch = _WATCH.get()
        if watch is not None:
            top_k_index = watch.without_padding(top_k_index, self.num_experts)
        chosen = [torch.where(top_k_index.t() == index) for index in range(self.num_experts)]
        if watch is not None:
            watch.inputs[self] = lambda index: hidden_states[chosen[index][1]]
            watch.counts[self] = torch.tensor([len(tokens) for _, tokens in chosen])
        running = [index for index, (_, tokens) in enumerate(chosen) if watch is not None or len(tokens)]
        total = torch.zeros_like(hidden_states)
        if not running:
            return total
        parts = []
        for index in running:
            x = hidden_states[chosen[index][1]]
            parts.append(self.act_fn(self.matrix(index, "gate")(x)) * self.matrix(index, "up")(x))
        middle = self.middle(torch.cat(parts)).split([len(part) for part in parts])
        del parts
        if watch is not None:
            watch.middle[self] = middle
        routed = torch.zeros(2, self.num_experts, dtype=torch.float64)
        for index, part in zip(running, middle, strict=True):
            place, tokens = chosen[index]
            output, weight = self.matrix(index, "down")(part), top_k_weights[tokens, place]
            if watch is not None:
                size = torch.linalg.vector_norm(output, dim=-1, dtype=torch.float32)
                routed[:, index] = torch.stack([weight.double().sum(), (weight * size).double().sum()])
            total.index_add_(0, tokens, (output * weight[:, None]).to(total.dtype))
        if watch is not None:
            watch.routed[self] = routed
        return total

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"num_experts={self.num_experts}"


def _linear(weight: Tensor, requires_grad: bool) -> nn.Linear:
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=requires_grad)
    return linear


def separate_experts(model: nn.Module) -> Callable[[], None]:
    """Take all experts of a model apart, in place; returns a function that puts them back, with their present weights.

    Does nothing for models whose family declares no experts.

    Raises:
        ArchitectureError: the model does not match the table of its family.
    """
    family = known_families().get(getattr(getattr(model, "config", None), "model_type", ""))
    if family is None or not any(stack.experts for stack in family.stacks):
        return lambda: None
    replaced: list[tuple[BoundExperts, SeparateExperts]] = []
    for block in bind(model).blocks:
        if block.experts is not None and not block.experts.separate:
            separate = SeparateExperts.from_bound(block.experts)
            replaced.append((block.experts, separate))
            model.set_submodule(block.experts.path, separate)

    def undo() -> None:
        for bound, separate in replaced:
            separate.write_into(bound)
            model.set_submodule(bound.path, bound.module)

    return undo


def separate_modules(model: nn.Module) -> dict[str, SeparateExperts]:
    """The experts of a model that were taken apart, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, SeparateExperts)}


def packs_experts(binding: Binding | None, paths: Iterable[str]) -> bool:
    """Whether any of the paths is a matrix of an expert, in 3D parameters or taken apart."""
    blocks = binding.blocks if binding is not None else ()
    matrices = {path for block in blocks if block.experts is not None for path in block.experts.matrices}
    return not matrices.isdisjoint(paths)
