"""Regexes that name exactly the modules that are meant, in the form that compressed-tensors and vLLM match.

Both use `re.match` on the module path. Paths that differ only in their numbers share a regex where all of them are
meant; the checkpoint may be loaded into the bare model (without its base prefix) or inside a larger one, so that the
part in front is left open wherever that names nothing else.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import cast

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming, apply_renamings

from hf_shrink.errors import CheckpointError

OPEN_START = r"(?:.*\.)?"


def targets_by_group(
    groups: Sequence[Sequence[str]], others: Iterable[str], prefix: str, stored: Mapping[str, str] | None = None
) -> list[list[str]]:
    """For each group of module paths the "re:" targets that match these paths and no path of another group.

    Args:
        groups: disjoint lists of module paths.
        others: every other module path of the model: must not be matched.
        prefix: the model's `base_model_prefix`, absent from paths in the bare model; may be empty.
        stored: other names of modules, in the weight files, which are matched as well where that tells them apart.

    Raises:
        CheckpointError: no set of regexes tells the groups apart in the bare model.
    """
    others = list(others)
    taken = {path for group in groups for path in group} | set(others)
    extra = {path: name for path, name in (stored or {}).items() if name not in taken}
    if extra:
        with suppress(CheckpointError):  # transformers itself goes by the modules' paths
            named = [[*group, *(extra[path] for path in group if path in extra)] for group in groups]
            return targets_by_group(named, others, prefix)
    everything = [path for group in groups for path in group] + others
    start = f"^(?:{re.escape(prefix)}\\.)?" if prefix else "^"
    for opening in (OPEN_START, start):
        found = [_targets(group, everything, prefix, opening) for group in groups]
        if _disjoint(found, groups, everything, prefix):
            return found
    raise CheckpointError(
        f"module paths of this model cannot be told apart without the prefix {prefix!r}; "
        "use portable: false or quantize fewer of them"
    )


def stored_names(model: PreTrainedModel, paths: Iterable[str]) -> dict[str, str]:
    """The names that modules have in the weight files, by path, where transformers renames them on saving.

    Other loaders (vLLM) name modules as the files do.
    """
    known = getattr(model, "_weight_conversions", None)
    if known is None:
        known = [c for c in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(c, PrefixChange)]
    renamings = [cast(WeightRenaming, c.reverse_transform()) for c in reversed(known) if isinstance(c, WeightRenaming)]
    names = {path: apply_renamings(f"{path}.weight", renamings).removesuffix(".weight") for path in paths}
    return {path: name for path, name in names.items() if name != path}


def _targets(paths: Sequence[str], everything: Sequence[str], prefix: str, opening: str) -> list[str]:
    bare = [_bare(path, prefix) for path in paths]
    numbers: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for path in bare:
        numbers[_shape(path)].add(_numbers(path))
    all_numbers: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for path in everything:
        path = _bare(path, prefix)
        all_numbers[_shape(path)].add(_numbers(path))
    patterns = [
        pattern
        for shape, wanted in numbers.items()
        for pattern in _patterns(shape, wanted, complete=wanted == all_numbers[shape])
    ]
    return [f"re:{opening}{pattern}$" for pattern in _merge_last_names(patterns)]


def _bare(path: str, prefix: str) -> str:
    return path.removeprefix(prefix + ".") if prefix else path


def _shape(path: str) -> str:
    """The path with "#" for every number: "layers.3.mlp" -> "layers.#.mlp"."""
    return ".".join("#" if part.isdigit() else part for part in path.split("."))


def _numbers(path: str) -> tuple[str, ...]:
    return tuple(part for part in path.split(".") if part.isdigit())


def _patterns(shape: str, wanted: set[tuple[str, ...]], complete: bool) -> list[str]:
    """Regexes for one shape of path. Several numbers of which some are missing: one regex each."""
    if complete:
        return [_fill(shape, [r"\d+"] * shape.split(".").count("#"))]
    ordered = sorted(wanted, key=lambda numbers: [int(n) for n in numbers])
    if len(ordered[0]) == 1 and len(ordered) > 1:
        return [_fill(shape, ["(?:" + "|".join(numbers[0] for numbers in ordered) + ")"])]
    return [_fill(shape, numbers) for numbers in ordered]


def _fill(shape: str, numbers: Sequence[str]) -> str:
    remaining = iter(numbers)
    return r"\.".join(next(remaining) if part == "#" else re.escape(part) for part in shape.split("."))


def _merge_last_names(patterns: Sequence[str]) -> list[str]:
    r"""["a\.q", "a\.k", "b\.q"] as ["a\.(?:q|k)", "b\.q"], first come first."""
    by_start: dict[str, list[str]] = {}
    for pattern in patterns:
        start, dot, last = pattern.rpartition(r"\.")
        by_start.setdefault(start + dot, []).append(last)
    return [start + (lasts[0] if len(lasts) == 1 else f"(?:{'|'.join(lasts)})") for start, lasts in by_start.items()]


def matches(path: str, targets: Iterable[str]) -> bool:
    """Whether any "re:" target matches, as compressed-tensors does it."""
    return any(re.match(target.removeprefix("re:"), path) for target in targets)


def _disjoint(
    found: Sequence[Sequence[str]], groups: Sequence[Sequence[str]], everything: Sequence[str], prefix: str
) -> bool:
    owner: Mapping[str, int] = {path: index for index, group in enumerate(groups) for path in group}
    return all(
        matches(form, targets) == (owner.get(path) == index)
        for path in everything
        for form in {path, _bare(path, prefix)}
        for index, targets in enumerate(found)
    )
