"""Blocks that come to an accelerator one at a time, for models that do not fit it whole."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class _Left:
    """What a tensor left behind on the CPU, and what its values looked like when they came to the accelerator."""

    home: Tensor
    looks: tuple[Tensor, Tensor]

    def is_of(self, tensor: Tensor) -> bool:
        """Whether the tensor has the values still that it came with."""
        if (tensor.shape, tensor.dtype) != (self.home.shape, self.home.dtype):
            return False
        return all(map(torch.equal, self.looks, _looks(tensor)))


class Visits:
    """One block is on the accelerator, the one that runs or ran last; and those that must stay for a while.

    What was not changed meanwhile goes back to the memory that it came from, a mapped file most of the time.

    Args:
        device: the accelerator.
        tensors: gives a block's, by name.
        read: told of every tensor on the CPU whose values are on the accelerator now.
    """

    def __init__(
        self,
        device: torch.device,
        tensors: Callable[[nn.Module], Mapping[str, Tensor]],
        read: Callable[[Tensor], None],
    ) -> None:
        self.device = device
        self._tensors, self._read = tensors, read
        self._visitor: weakref.ref[nn.Module] | None = None
        self._staying: list[nn.Module] = []
        self._left: dict[int, dict[str, _Left]] = {}  # by block

    def invite(self, block: nn.Module) -> None:
        """Let the block come whenever it runs. A copy of it does not come by itself: it stays where it was made."""
        block.forward = _Forward(self, block)

    def bring(self, block: nn.Module) -> None:
        """Have the block here, and no other that does not stay."""
        before = None if self._visitor is None else self._visitor()
        if before is not block and before is not None:
            self.send_back(before)
        self._visitor = weakref.ref(block)
        # Also of a block that is here and got other tensors meanwhile.
        homes = {n: tensor.data for n, tensor in self._tensors(block).items() if tensor.device.type == "cpu"}
        if not homes:
            return
        block.to(self.device)
        here = self._tensors(block)
        for name, home in homes.items():
            self._left.setdefault(id(block), {})[name] = _Left(home, _looks(here[name]))
            self._read(home)

    def send_back(self, block: nn.Module) -> None:
        """Nobody needs the block here for a while, unless it stays."""
        tensors = self._tensors(block)
        if any(block is other for other in self._staying) or all(t.device.type == "cpu" for t in tensors.values()):
            return
        known = self._left.pop(id(block), {})
        homes = {
            id(tensor): left.home
            for name, tensor in tensors.items()
            if (left := known.get(name)) is not None and left.is_of(tensor)
        }

        def back(tensor: Tensor) -> Tensor:
            return homes.get(id(tensor), tensor).cpu()

        block._apply(back)  # type: ignore[no-untyped-call]

    @contextmanager
    def staying(self, block: nn.Module) -> Iterator[None]:
        """Have the block here, whatever else comes and goes."""
        self._staying.append(block)
        self.bring(block)
        try:
            yield
        finally:
            self._staying.remove(block)
            if self._visitor is None or self._visitor() is not block:
                self.send_back(block)


class _Forward:
    """A block's forward, once the block is there."""

    def __init__(self, visits: Visits, block: nn.Module) -> None:
        self._visits = visits
        self._block = weakref.ref(block)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        block = self._block()
        assert block is not None
        self._visits.bring(block)
        return type(block).forward(block, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        block = self._block()
        copied = memo[id(block)]
        return MethodType(type(copied).forward, copied)


def _looks(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of a tensor's bits, taken as integers, by row and by column: other values have other sums."""
    flat = tensor.detach().contiguous().reshape(-1)
    columns = tensor.shape[-1] if tensor.dim() and tensor.numel() else 1
    bits = flat.view(_BITS[tensor.element_size()]).reshape(-1, columns)
    return bits.sum(0, dtype=torch.int64), bits.sum(1, dtype=torch.int64)
