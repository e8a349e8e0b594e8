"""The weights at a model's two ends: the input embedding and the output head, often one and the same."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from hf_shrink.architectures.embeddings import token_table
from hf_shrink.architectures.linears import is_matrix
from hf_shrink.calibration.looked_up import also_looked_up
from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.calibration.walk import StackWalk


def outer_weights(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Paths of the input embedding and the output head, together where they share a weight.

    Not of embeddings of a class of their own, which compute something besides.
    """
    if not isinstance(model, PreTrainedModel):
        return ()
    ends = [token_table(model), model.get_output_embeddings()]
    fit = [m for m in ends if m is not None and (type(m) is nn.Embedding or is_matrix(m))]
    paths = {path: module for path, module in model.named_modules() if any(module is m for m in fit)}
    groups: dict[int, list[str]] = {}
    for path, module in paths.items():
        groups.setdefault(id(module.weight), []).append(path)
    shared = {id(m.weight) for m in model.modules() if not any(m is f for f in fit) and hasattr(m, "weight")}
    return tuple(tuple(found) for weight, found in groups.items() if weight not in shared)


def head_of(model: nn.Module, paths: tuple[str, ...]) -> str | None:
    """Which of the paths of one weight is an output head's."""
    return next((path for path in paths if is_matrix(model.get_submodule(path))), None)


def head_statistics(model: nn.Module, walk: StackWalk) -> dict[str, InputStatistics]:
    """Second moments of the output head's inputs, by its path; nothing where there is no head.

    Args:
        walk: of the last stack, every block advanced.
    """
    groups = outer_weights(model)
    heads = {path: paths for paths in groups if (path := head_of(model, paths)) is not None}
    if not heads:
        return {}
    found = walk.statistics_after(model, {path: model.get_submodule(path) for path in heads})
    return {path: also_looked_up(own) if len(heads[path]) > 1 else own for path, own in found.items()}
