"""What a model's forward takes, as its signature says."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def accepted_names(model: nn.Module) -> frozenset[str] | None:
    """The argument names of `forward`; None when it takes any (a plain module with **kwargs).

    Of a transformers model whose own forward names none, but hands on what it gets: the nearest parent's that does.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    if takes_any and not isinstance(model, PreTrainedModel):
        return None
    parents = (vars(cls)["forward"] for cls in type(model).__mro__ if "forward" in vars(cls)) if takes_any else ()
    return next((names for f in (model.forward, *parents) if (names := _named(f))), frozenset())


def _named(forward: Callable[..., Any]) -> frozenset[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(forward).parameters.values()
    return frozenset(p.name for p in parameters if p.kind in kinds) - {"self"}
