"""How targets name modules: by path, by regex, by class."""

from __future__ import annotations

import re

from torch import nn
from transformers.pytorch_utils import Conv1D


def matches(path: str, module: nn.Module, target: str) -> bool:
    """Whether a target means this module.

    A target is its path or that of a module around it, a "re:" regex from the start of the path, or its class name.
    """
    if target.startswith("re:"):
        return re.match(target[3:], path) is not None
    return target in (path, class_of(module)) or path.startswith(f"{target}.")


def class_of(module: nn.Module) -> str:
    """The class name that a target uses; Conv1D, a Linear stored transposed, counts as Linear."""
    return "Linear" if isinstance(module, Conv1D) else type(module).__name__
