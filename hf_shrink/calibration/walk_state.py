"""A walk's state between two blocks, to be written down and taken up again by another process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from hf_shrink.calibration.walk import StackWalk
from hf_shrink.residence import map_tensors, write_tensors


def write_walk(walk: StackWalk, path: Path) -> None:
    """The hidden states in front of the current block, and what earlier blocks hand to later ones."""
    handed = {
        f"handed.{batch}.{block}.{place}": value
        for batch, found in enumerate(walk.arguments.handed)
        for (block, place), value in found.items()
        if isinstance(value, Tensor)
    }
    kinds = {f"hidden.{batch}": walk.hidden.kind(batch) for batch in range(len(walk.hidden))}

    def read(name: str) -> Tensor:
        return handed[name] if name in handed else walk.hidden[int(name.rpartition(".")[2])]

    write_tensors(path, kinds | handed, read=read)


def read_walk(walk: StackWalk, path: Path, position: int, starved: Mapping[str, int]) -> None:
    """Bring a new walk over the same batches to where the written one was."""
    with torch.no_grad():
        for name, tensor in map_tensors(path).items():
            kind, batch, *rest = name.split(".")
            tensor = tensor.to(walk.hidden[int(batch)].device, copy=True)
            if kind == "hidden":
                walk.hidden[int(batch)] = tensor
            else:
                block, place = map(int, rest)
                walk.arguments.handed[int(batch)][block, place] = tensor
    walk.go_to(position, starved)
