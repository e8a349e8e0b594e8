"""Training and eval mode of a model's modules, kept over work that needs another."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_kept(*models: nn.Module) -> Iterator[None]:
    """Each module is in its own mode again afterwards; modules that came meanwhile are in their model's."""
    whole = [model.training for model in models]
    # Weak, so that no weight stays in memory that is replaced.
    modes = weakref.WeakKeyDictionary({module: module.training for model in models for module in model.modules()})
    try:
        yield
    finally:
        for model, training in zip(models, whole, strict=True):
            for module in model.modules():
                module.training = modes.get(module, training)
