"""Whether the patterns of a step (targets, ignore, overrides) mean any of the weights that it could touch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from torch import nn

from hf_shrink.architectures.matching import class_of, matches
from hf_shrink.errors import RecipeError
from hf_shrink.registry import did_you_mean


def check_patterns(
    step: str,
    patterns: Mapping[str, Iterable[str]],
    model: nn.Module,
    weights: Mapping[str, nn.Module],
    means: Callable[[str], bool],
) -> list[str]:
    """Every pattern must be a valid regex and mean a weight.

    Args:
        step: "quantize" or "prune".
        patterns: by the step's key.
        weights: the modules that hold what the step could touch, by path.
        means: whether a pattern means one of them.

    Returns:
        Notes: an `ignore` that means nothing may be for other models, or be misspelt.

    Raises:
        RecipeError: a pattern is no regex, means only modules around weights, or is no `ignore` and means nothing.
    """
    around = _around(weights)
    holders = {path: module for path, module in model.named_modules() if path in around}
    names = {*weights, *around, *map(class_of, weights.values())}
    notes = []
    for key, own in patterns.items():
        for pattern in own:
            try:
                if means(pattern):
                    continue
                holder = next((path for path, module in holders.items() if matches(path, module, pattern)), None)
            except re.error as error:
                raise RecipeError(f"{step}.{key}: {pattern!r} is not a valid regex: {error}") from error
            said = f"{step}.{key}: {pattern!r} means no weight"
            if holder is not None:
                last = holder.rpartition(".")[2]
                raise RecipeError(
                    f"{said}, only modules that hold some; name such a module by its path ({holder!r}), or what is in "
                    f"them by a regex such as {f're:.*{last}[.]'!r}"
                )
            if key != "ignore":
                raise RecipeError(f"{said}; {did_you_mean(pattern, names)}")
            notes.append(f"{said}, so nothing is left out by it")
    return notes


def _around(paths: Iterable[str]) -> set[str]:
    """The paths of the modules inside the model that are around some."""
    found: set[str] = set()
    for path in paths:
        while path := path.rpartition(".")[0]:
            found.add(path)
    return found
