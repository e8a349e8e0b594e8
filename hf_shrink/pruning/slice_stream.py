"""How the residual stream of a model is cut: moments of what its norms pass on, and from these what is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_shrink.architectures.bound import BoundStack
from hf_shrink.architectures.residual import Reader, ResidualStream
from hf_shrink.calibration.precision import float32_for_now
from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.calibration.walk import StackWalk
from hf_shrink.plan import HiddenPlan
from hf_shrink.progress import ProgressCallback, quiet
from hf_shrink.pruning.base import HiddenMethod
from hf_shrink.surgery.hidden import Slice, tied_scale


def find_slice(
    model: PreTrainedModel,
    stack: BoundStack,
    stream: ResidualStream,
    plan: HiddenPlan,
    method: HiddenMethod,
    batches: Sequence[Mapping[str, Any]],
    progress: ProgressCallback = quiet,
) -> Slice:
    """How the stream is cut to `plan.width` channels, from what the norms pass on of it. The model is left as it was.

    Raises:
        CalibrationError: no data, or numbers that are not finite.
    """
    moments = _moments(model, stack, stream, batches, progress)
    last_norm = stream.readers[-1].norm
    scale, mean = torch.ones(stream.width, dtype=torch.float64), None
    embedding = scale
    if stream.tied:
        weight = model.get_submodule(last_norm).weight
        assert isinstance(weight, Tensor)
        energy = torch.stack([moment.diagonal() for moment in moments.values()]).mean(0)
        scale, embedding, mean = tied_scale(weight.detach().cpu() + stream.offset, energy)
    squares = scale.square()
    gain = {
        norm: float(((squares * m.diagonal()).sum() / m.diagonal().sum().clamp_min(1e-30)).sqrt())
        for norm, m in moments.items()
    }
    pooled = torch.zeros(stream.width, stream.width, dtype=torch.float64)
    for norm, moment in moments.items():
        pooled += scale[:, None] * moment * scale / max(gain[norm] ** 2, 1e-30) / len(moments)
    basis = method.directions(pooled)[:, : plan.width].contiguous()
    last = None if mean is None else mean * gain[last_norm] * stream.width / plan.width
    return Slice(scale, embedding, basis, gain, last)


def _moments(
    model: PreTrainedModel,
    stack: BoundStack,
    stream: ResidualStream,
    batches: Sequence[Mapping[str, Any]],
    progress: ProgressCallback,
) -> dict[str, Tensor]:
    """By norm, float64 (width, width) on the CPU: the mean of x x^T over what it passes on, before its weight."""
    walk = StackWalk(model, [block.module for block in stack.blocks], batches)
    moments: dict[str, Tensor] = {}

    def keep(readers: Sequence[Reader], found: Mapping[str, InputStatistics | None]) -> None:
        for reader in readers:
            statistics = found.get(reader.matrices[0])
            if statistics is not None:
                moments[reader.norm] = _unweighted(model, stream, reader, statistics.mean)

    for block in stack.blocks:
        progress("measuring the residual stream", block.index, len(stack.blocks))
        readers = [reader for reader in stream.readers if reader.norm.startswith(block.path + ".")]
        matrices = {reader.matrices[0]: model.get_submodule(reader.matrices[0]) for reader in readers}
        with float32_for_now(block.module):
            if walk.advance_in_stages(matrices, lambda f, r=readers: keep(r, f), model.get_submodule) is None:  # type: ignore[misc]
                keep(readers, walk.statistics(matrices))
                walk.advance()
    progress("measuring the residual stream", len(stack.blocks), len(stack.blocks))
    last = stream.readers[-1]
    heads: dict[str, nn.Module] = {last.matrices[0]: model.get_submodule(last.matrices[0])}
    keep([last], walk.statistics_after(model, heads))
    return moments


def _unweighted(model: nn.Module, stream: ResidualStream, reader: Reader, moment: Tensor) -> Tensor:
    weight = model.get_submodule(reader.norm).weight
    assert isinstance(weight, Tensor)
    gain = weight.detach().cpu().double() + stream.offset
    size = gain[:, None] * gain
    return torch.where(size == 0, 0.0, moment.cpu().double() / torch.where(size == 0, 1.0, size))
