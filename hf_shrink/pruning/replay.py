"""Run a model with what some blocks put out before handed through again instead of computed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from hf_shrink.calibration.routing import routed
from hf_shrink.errors import ArchitectureError

K = TypeVar("K", bound=Hashable)


@contextmanager
def recording(blocks: Mapping[K, nn.Module]) -> Iterator[dict[K, Any]]:
    """Yields a dict that fills, in the order in which the blocks run, with their outputs.

    Raises:
        ArchitectureError: a block ran twice in one forward pass.
    """
    outputs: dict[K, Any] = {}

    def record(number: K, real: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if number in outputs:
            raise ArchitectureError("a block runs twice in one forward pass; blocks cannot be left out of such a model")
        outputs[number] = real(*args, **kwargs)
        return outputs[number]

    with routed(blocks, record):
        yield outputs


@contextmanager
def replaying(blocks: Mapping[K, nn.Module], outputs: Mapping[K, Any]) -> Iterator[None]:
    """The blocks return what was recorded of them. Right as long as nothing in front of them has changed."""

    def replay(number: K, real: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return outputs[number]

    with routed(blocks, replay):
        yield
