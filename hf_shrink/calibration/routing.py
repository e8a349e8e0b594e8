"""Put something between a model and its blocks for a while."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

K = TypeVar("K", bound=Hashable)


@contextmanager
def routed(blocks: Mapping[K, nn.Module], through: Callable[[K, Callable[..., Any], Any, Any], Any]) -> Iterator[None]:
    """Every block's forward goes through `through(key, real forward, args, kwargs)`."""
    previous: dict[K, Any] = {key: block.__dict__.get("forward") for key, block in blocks.items()}
    for key, block in blocks.items():

        def forward(*args: Any, _key: K = key, _real: Callable[..., Any] = block.forward, **kwargs: Any) -> Any:
            return through(_key, _real, args, kwargs)

        block.forward = forward
    try:
        yield
    finally:
        for key, block in blocks.items():
            if previous[key] is None:
                del block.forward
            else:
                block.forward = previous[key]
