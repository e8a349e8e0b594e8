"""Modules that share one weight: an output head and its embedding."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from hf_shrink.architectures.linears import is_matrix
from hf_shrink.errors import RecipeError
from hf_shrink.plan import Scheme


def head_paths(model: nn.Module, candidates: Iterable[str]) -> frozenset[str]:
    """The paths of a model's output head and of what shares its weight, as far as they can be packed.

    Raises:
        RecipeError: the model has no output head, or it cannot be packed.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    paths = next(
        (paths for paths in weight_holders(model).values() if any(model.get_submodule(p) is head for p in paths)), []
    )
    found = frozenset(paths) & frozenset(candidates)
    if not any(model.get_submodule(path) is head for path in found):
        raise RecipeError(f"{type(model).__name__} has no output head that can be packed; take out quantize.head")
    return found


def weight_holders(model: nn.Module) -> dict[int, list[str]]:
    """Paths of the modules with a matrix or an embedding, by the identity of their weight: several where it is tied."""
    holders: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        if is_matrix(module) or isinstance(module, nn.Embedding):
            holders.setdefault(id(module.weight), []).append(path)
    return holders


def keep_ties(model: nn.Module, chosen: dict[str, str | None], by_name: set[str]) -> list[str]:
    """Take out weights not chosen `by_name` whose tied partner stays dense: untied, they would add bytes."""
    notes = []
    for paths in weight_holders(model).values():
        dense = [path for path in paths if path not in chosen]
        for path in paths:
            if dense and path in chosen and path not in by_name:
                del chosen[path]
                notes.append(f"{path} stays dense: it shares its weight with {dense[0]}, which is not quantized")
    return notes


def agree_on_ties(model: nn.Module, chosen: dict[str, Scheme]) -> dict[str, Scheme]:
    """Modules that share one weight and are both chosen are stored once: the first one's scheme for all of them."""
    first: dict[int, Scheme] = {}
    return {path: first.setdefault(id(model.get_submodule(path).weight), scheme) for path, scheme in chosen.items()}
