"""A mask on the units of a part, in front of the matrix that reads them."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_shrink.training.pruning.scoring import TrainingScore

_PLACED: WeakKeyDictionary[nn.Module, list[RemovableHandle]] = WeakKeyDictionary()


class Gate:
    """Multiplies the inputs of a matrix by a mask on its units, by a hook on the module.

    A unit behind a closed gate computes nothing: neither the columns that read it nor the rows that make it get a
    gradient, whatever weights, optimizer and adapters are. Nothing of the model itself is changed.

    Args:
        index: int64 (units, width), the matrix's inputs that belong to each unit.
        score: sees the gradients by the mask, of every row of the first dimension of the matrix's input: a sample,
            where the block keeps samples apart. None: gradients are not looked at.

    Attributes:
        mask: float32 (units,), 1 or 0; a leaf that does not belong to the model. Its `grad` collects what the score
            says of every backward pass, as long as it requires gradients.
    """

    def __init__(self, index: Tensor, score: TrainingScore | None) -> None:
        self._index, self._score = index, score
        self.mask = torch.ones(len(index))

    def place(self, module: nn.Module) -> None:
        """In front of the matrix; see `remove_gates`."""
        _PLACED.setdefault(module, []).append(module.register_forward_pre_hook(self._hook))

    def _hook(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self(inputs[0]), *inputs[1:])

    def __call__(self, x: Tensor) -> Tensor:
        """(..., inputs) in any dtype."""
        mask, index = self.mask.to(x.device), self._index.to(x.device)
        if not mask.requires_grad:
            return x * _spread(mask, index, x)
        gated: Tensor = _Gated.apply(x, mask, index, self._score)  # type: ignore[no-untyped-call]
        return gated

    def reset(self, device: torch.device) -> None:
        """Open for all units."""
        self._index = self._index.to(device)
        self.mask = torch.ones(len(self._index), device=device, requires_grad=self._score is not None)

    def close(self, kept: Tensor) -> None:
        """`kept`: bool (units,)."""
        with torch.no_grad():
            self.mask.copy_(kept)

    def settle(self) -> None:
        """From now on the mask stays, and gradients are not looked at."""
        self.mask = self.mask.detach()

    def collected(self) -> Tensor:
        """What the score says of the backward passes since the last call, float32 (units,)."""
        found, self.mask.grad = self.mask.grad, None
        return torch.zeros_like(self.mask) if found is None else found


def remove_gates(model: nn.Module) -> None:
    """Take away all gates that were placed in a model, those of an earlier training that was given up as well."""
    for module in model.modules():
        for handle in _PLACED.pop(module, []):
            handle.remove()


def _spread(mask: Tensor, index: Tensor, x: Tensor) -> Tensor:
    """From units to inputs, (inputs,) in the dtype of `x`; inputs that belong to no unit have 1."""
    each = mask.detach()[:, None].expand(index.shape).reshape(-1)
    return x.new_ones(x.shape[-1]).index_copy(0, index.reshape(-1), each.to(x.dtype))


class _Gated(torch.autograd.Function):
    """x * m. Its "gradient" by the mask is not the sum over samples of dL/dm, but of what a score makes of each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, index: Tensor, score: TrainingScore) -> Tensor:
        spread = _spread(mask, index, x)
        ctx.save_for_backward(x, spread, index)
        ctx.score = score
        return x * spread

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, spread, index = ctx.saved_tensors
        half = x.dtype == torch.float16  # whose products may overflow
        product = x.float() * gradient.float() if half else x * gradient
        rows = product.reshape(len(product), -1, product.shape[-1]).sum(1, dtype=torch.float32)
        units = rows.index_select(1, index.reshape(-1)).view(len(rows), *index.shape).sum(-1)
        return gradient * spread, ctx.score.of(units), None, None
