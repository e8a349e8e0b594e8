"""What runs before a stack: which batches come to it at all, and the inputs of the matrices on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from hf_shrink.calibration.capture import model_inputs
from hf_shrink.calibration.merging import merged
from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.sharding import share


class _Arrived(Exception):
    """The block has been reached; the rest of the forward is not needed."""


def batches_reaching(
    model: nn.Module, block: nn.Module, batches: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """The batches on which the model runs `block` (an image encoder's: those with images)."""
    shared = share(len(batches))
    reached = shared.gather(_run_until(model, block, batch) for batch in shared.of(batches))
    return [batch for batch, there in zip(batches, reached, strict=True) if there]


def statistics_before(
    model: nn.Module, block: nn.Module, batches: Sequence[Mapping[str, Any]], matrices: Mapping[str, nn.Module]
) -> dict[str, InputStatistics]:
    """Second moments of the inputs, by path, of those of `matrices` that run before `block`; others are left out.

    Raises:
        CalibrationError: numbers are not finite.
    """
    shared = share(len(batches))
    found: dict[str, InputStatistics] = {}

    def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(_: nn.Module, args: tuple[Any, ...]) -> None:
            x: Tensor = args[0]
            if path not in found:
                found[path] = InputStatistics.empty(x.shape[-1], x.device)
            found[path].add(x)

        return add

    with ExitStack() as stack:
        for path, module in matrices.items():
            stack.callback(module.register_forward_pre_hook(hook(path)).remove)
        for batch in shared.of(batches):
            _run_until(model, block, batch)
    sums = merged({path: found.get(path) for path in matrices}, shared)
    return {path: statistics.finish(path) for path, statistics in sums.items() if statistics is not None}


def _run_until(model: nn.Module, block: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Run the model until it comes to the block; whether it did."""

    def arrive(_: nn.Module, __: tuple[Any, ...]) -> None:
        raise _Arrived

    handle = block.register_forward_pre_hook(arrive)
    try:
        with torch.no_grad():
            model(**model_inputs(model, batch))
    except _Arrived:
        return True
    finally:
        handle.remove()
    return False
