"""What blocks are called with besides the hidden states, for every batch of a walk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_shrink.calibration.capture import Call


class Arguments:
    """The captured calls of a stack's blocks; tensors that earlier blocks hand to later ones come from the walk.

    Attributes:
        handed: for each batch, what blocks so far hand to later ones, by block and place in its output.

    Args:
        calls, links: as of `Captured`.
        dtype: of what is floating-point.
    """

    def __init__(
        self, calls: list[list[Call]], links: Sequence[dict[str, tuple[int, int]]], dtype: torch.dtype
    ) -> None:
        self._calls, self._links, self._dtype = calls, links, dtype
        self.handed: list[dict[tuple[int, int], Any]] = [{} for _ in calls]

    def of(self, batch: int, block: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of a block for a batch."""
        call = self._calls[batch][block]
        args, kwargs = list(call.args), dict(call.kwargs)
        named: Any
        for named, link in self._links[block].items():
            if isinstance(named, int):
                args[named] = self.handed[batch][link]
            else:
                kwargs[named] = self.handed[batch][link]
        return tuple(self._cast(a) for a in args), {k: self._cast(v) for k, v in kwargs.items()}

    def done(self, batch: int, block: int, output: Any) -> None:
        """A block has run on a batch: keep what later ones get of its output, forget what it was called with."""
        self.hand(batch, block, output)
        self._calls[batch][block] = Call((), {})

    def hand(self, batch: int, block: int, output: Any) -> None:
        """Keep what later blocks get of an output."""
        for links in self._links:
            for source, place in links.values():
                if source == block:
                    self.handed[batch][block, place] = output[place]

    @contextmanager
    def ahead(self, batch: int) -> Iterator[None]:
        """What is handed on inside is forgotten in the end."""
        before = dict(self.handed[batch])
        try:
            yield
        finally:
            self.handed[batch] = before

    def forget(self, blocks: range) -> None:
        """These blocks will not run any more."""
        for calls in self._calls:
            for block in blocks:
                calls[block] = Call((), {})

    def _cast(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(self._dtype)
        if isinstance(value, tuple):
            return tuple(self._cast(v) for v in value)
        return value
