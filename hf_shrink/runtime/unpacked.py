"""Dense copies of packed weights, for as long as many products in a row are made with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from hf_shrink.runtime.packed import PackedModule


@contextmanager
def kept_dense(module: nn.Module) -> Iterator[None]:
    """Unpack the weights of all packed modules inside `module` once for everything computed with them inside.

    What is computed is the same to the bit. Weights must not be changed, cast or moved meanwhile. Modules that a
    kernel multiplies, and those that multiply integers as they are (W8A8), are left alone.
    """
    packed = [m for m in module.modules() if isinstance(m, PackedModule) and m.unpacks and m.kept_dense is None]
    for one in packed:
        one.kept_dense = one.weight
    try:
        yield
    finally:
        for one in packed:
            one.kept_dense = None
