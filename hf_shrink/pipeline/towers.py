"""Towers (image encoders), which run before the stacks: which of them a run quantizes, and on which batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from hf_shrink.architectures.binding import Binding
from hf_shrink.architectures.bound import BoundStack
from hf_shrink.calibration.before import batches_reaching
from hf_shrink.errors import CalibrationError

Batches = Sequence[Mapping[str, Any]]


def towers_with(binding: Binding | None, paths: Iterable[str]) -> list[BoundStack]:
    """The towers that hold some of `paths`."""
    wanted = list(paths)
    towers = binding.towers if binding is not None else ()
    return [tower for tower in towers if any(path.startswith(tower.path + ".") for path in wanted)]


def tower_batches(model: nn.Module, towers: Iterable[BoundStack], batches: Batches) -> dict[str, Batches]:
    """For each tower, by path, the batches that come to it.

    Raises:
        CalibrationError: none does.
    """
    found: dict[str, Batches] = {}
    for tower in towers:
        found[tower.path] = batches_reaching(model, tower.blocks[0].module, batches)
        if not found[tower.path]:
            raise CalibrationError(
                f"the recipe quantizes {tower.path}, but no batch of the calibration data comes to it; pass "
                "calibration= model-input dicts (or rows) with images and text, or use method: rtn"
            )
    return found
