"""Carry out what a plan says of the residual stream, before the walk."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_shrink.architectures.binding import Binding, bind
from hf_shrink.architectures.bound import BoundStack
from hf_shrink.architectures.residual import ResidualStream, find_residual
from hf_shrink.errors import ArchitectureError, CalibrationError
from hf_shrink.pipeline.kept import KeptStack
from hf_shrink.pipeline.packing import untie
from hf_shrink.plan import HiddenPlan
from hf_shrink.progress import ProgressCallback
from hf_shrink.pruning.base import HIDDEN
from hf_shrink.pruning.refit_stream import DenseCopy, refit_stream
from hf_shrink.pruning.slice_stream import find_slice
from hf_shrink.report import ShrinkReport
from hf_shrink.runtime.packed import count_parameters
from hf_shrink.surgery.hidden import slice_stream


def slice_planned(
    model: nn.Module,
    stacks: Sequence[KeptStack],
    plan: HiddenPlan,
    batches: Sequence[Mapping[str, Any]],
    report: ShrinkReport,
    progress: ProgressCallback,
) -> list[KeptStack]:
    """Cut the residual stream in place; returns the stacks as they are bound then.

    Raises:
        ArchitectureError: the plan was made for another model.
        CalibrationError: no data, or numbers that are not finite.
    """
    if not batches or not isinstance(model, PreTrainedModel):
        raise CalibrationError("cutting the residual stream needs a transformers model and calibration data")
    since = time.perf_counter()
    stream = _stream(model, [kept.stack for kept in stacks], plan)
    stack = next(kept.stack for kept in stacks if kept.stack.name == plan.stack)
    notes = report.notes
    if plan.untie and stream.tied:
        before = count_parameters(model)
        untie(model, set(stream.readers[-1].matrices))
        added = (count_parameters(model) - before) * plan.width // stream.width
        notes.append(f"the head has a weight of its own now: {added:,} parameters more than tied to the embedding")
        stream = _stream(model, [kept.stack for kept in stacks], plan)
    how = find_slice(model, stack, stream, plan, HIDDEN.build(plan.method, plan.options), batches, progress)
    dense = DenseCopy(model, stack, stream, batches) if plan.refit else None
    slice_stream(model, stack, stream, how)
    bound = bind(model)
    if dense is not None:
        notes += refit_stream(model, bound.stack(plan.stack), stream, dense, how, batches, progress)
    notes.append(f"the residual stream of the {plan.stack} has {plan.width} of {stream.width} channels")
    report.seconds["slice"] = time.perf_counter() - since
    return [KeptStack(bound.stack(kept.stack.name), kept.kept, kept.plan) for kept in stacks]


def check_hidden(model: nn.Module, binding: Binding, plan: HiddenPlan) -> None:
    """See that a residual stream can be cut as planned. The model is without the blocks and parts that go too.

    Raises:
        ArchitectureError: the plan was made for another model.
        RecipeError: there is no such method, or it does not take these options.
    """
    HIDDEN.build(plan.method, plan.options)
    _stream(model, binding.stacks, plan)


def _stream(model: nn.Module, stacks: Iterable[BoundStack], plan: HiddenPlan) -> ResidualStream:
    for stack in stacks:
        if stack.name == plan.stack:
            stream = find_residual(model, stack, tied=True)
            if isinstance(stream, str):
                raise ArchitectureError(f"the residual stream of the {plan.stack} cannot be cut: {stream}")
            if not 0 < plan.width < stream.width:
                raise ArchitectureError(f"the plan cuts a stream of {stream.width} channels to {plan.width}")
            return stream
    raise ArchitectureError(f"the plan cuts the residual stream of {plan.stack!r}, which this model does not have")
