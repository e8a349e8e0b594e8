"""Check, before parts are left out, that a block without one gives what it gives when the part writes zeros."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_shrink.architectures.absent import without_parts
from hf_shrink.architectures.bound import BoundMlp
from hf_shrink.architectures.linears import matrix
from hf_shrink.calibration.capture import first_output, model_inputs
from hf_shrink.errors import ArchitectureError, CalibrationError
from hf_shrink.pruning.items import Item, Items
from hf_shrink.pruning.samples import choose

TOLERANCE = 1e-3  # of the largest value; both ways compute the same, but for rounding in half precision


def verify_parts(model: nn.Module, items: Items, batches: Sequence[Mapping[str, Any]]) -> None:
    """Try the first item of every kind of part in every stack on one sample.

    Raises:
        ArchitectureError: the family's table does not describe how such a block works.
        CalibrationError: no data.
    """
    if not batches:
        raise CalibrationError("there is no calibration data to measure blocks on")
    inputs = model_inputs(model, choose(batches, 1, 0)[0])
    kinds: dict[tuple[str, str | None], Item] = {}
    for item in items.all:
        kinds.setdefault((item.stack.name, item.part), item)
    for item in kinds.values():
        _verify(model, item, inputs)


def _verify(model: nn.Module, item: Item, inputs: Mapping[str, Any]) -> None:
    assert item.stack.spec is not None and item.part is not None
    with _writing_zeros(item):
        expected = _output(model, item.block.module, inputs)
    try:
        with without_parts([(item.block.module, item.stack.spec, (item.part,))]):
            found = _output(model, item.block.module, inputs)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ArchitectureError(f"{item.block.path} does not run without its {item.part}: {error}") from error
    scale = float(expected.abs().max().nan_to_num(posinf=0.0)) if len(expected) else 0.0
    if not torch.allclose(found, expected, rtol=0, atol=TOLERANCE * scale, equal_nan=True):
        raise ArchitectureError(
            f"{item.block.path} without its {item.part} does not give what it gives when that writes zeros, so the "
            "family's table is not right about it; prune with parts: blocks"
        )


@contextmanager
def _writing_zeros(item: Item) -> Iterator[None]:
    part = getattr(item.block, str(item.part))
    weight = matrix(part.modules[part.slot("down" if isinstance(part, BoundMlp) else "output").path])
    kept = weight.clone()
    weight.zero_()
    try:
        yield
    finally:
        weight.copy_(kept)


def _output(model: nn.Module, block: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The block's hidden states, float32."""
    seen: list[Tensor] = []
    handle = block.register_forward_hook(lambda _, __, output: seen.append(first_output(output).float()))
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        handle.remove()
    if not seen:
        raise CalibrationError("a block never runs on this calibration data; give data that reaches it")
    return seen[0]
