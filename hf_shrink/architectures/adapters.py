"""What adapters of PEFT do to a model's modules: each stands in the place of the layer that it was put on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.utils.import_utils import is_peft_available


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[int]:
    """The model with the layers that adapters were put on in the adapters' place, to look at; how many there are."""
    places: list[tuple[nn.Module, str, Any]] = []
    if is_peft_available():
        from peft.tuners.tuners_utils import BaseTunerLayer

        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, BaseTunerLayer) and not isinstance(parent, BaseTunerLayer):
                    places.append((parent, name, child))
                    setattr(parent, name, child.get_base_layer())
    try:
        yield len(places)
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)
