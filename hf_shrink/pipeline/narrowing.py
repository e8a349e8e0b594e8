"""Cut a block and store what is left of its matrices in few bits, in one pass beside the dense stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor, nn

from hf_shrink.architectures.bound import BoundBlock
from hf_shrink.architectures.linears import matrix
from hf_shrink.calibration.dense_stream import DenseStream
from hf_shrink.calibration.passed import Passed
from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.calibration.walk import StackWalk
from hf_shrink.pipeline.cutting import refit_masked
from hf_shrink.pipeline.packing import Task, put_packed, solve
from hf_shrink.plan import BlockPlan
from hf_shrink.pruning.refit import LONGEST
from hf_shrink.quantization.base import QuantizationMethod, QuantizedWeight
from hf_shrink.surgery import cut_block, matrix_cuts

MakeTask = Callable[[str, InputStatistics | None], Task]


def cut_and_pack(
    model: nn.Module,
    block: BoundBlock,
    plan: BlockPlan,
    modules: Mapping[str, nn.Module],
    make_task: MakeTask,
    method: QuantizationMethod,
    walk: StackWalk,
    dense: DenseStream | None,
    timed: Callable[[str], AbstractContextManager[None]],
    *,
    further: bool,
) -> tuple[Passed, list[str]] | None:
    """Cut a block, refit what reads what was cut, and pack its matrices.

    Stage by stage: what reads cut units is refitted, on what the rounded matrices before it put out, to the dense
    model's outputs, and rounded from there; what else reads the stream is corrected for its drift, as in blocks that
    keep everything. Until all batches are through, the block keeps its sizes, as the dense one beside it does: rows
    that go stay as they were, because a refit asks what they put out, and columns that go are zero.

    Args:
        modules: the block's matrices to be packed, by path.
        make_task: of a path and the statistics of its inputs.
        method: packs them.
        walk: in front of the block.
        dense: in front of it too; after this it is behind it.
        further: whether the walk shall go through the block.

    Returns:
        The block's outputs for the first batch, with the walk gone on if asked, and notes. None, with nothing done,
        when the block cannot be stopped between its stages. Not for blocks with experts.
    """
    cuts = matrix_cuts(block, plan)
    readers = {path: kept for (path, axis), kept in cuts.items() if axis == "in"}
    packed: dict[str, QuantizedWeight] = {}
    notes: list[str] = []

    def task_of(path: str, found: InputStatistics | None) -> Task:
        rows, columns = cuts.get((path, "out")), readers.get(path)
        if found is not None and columns is not None:
            found = found.narrowed(columns)
        task = make_task(path, found)
        if rows is None and columns is None:
            return task
        return replace(task, weight=_part(matrix(modules[path]), rows, columns))

    def deal(found: Mapping[str, InputStatistics | None]) -> None:
        with timed("solve"):
            for path in found.keys() & readers.keys():
                statistics = found[path]
                assert statistics is not None  # only experts go without
                refit_masked(model.get_submodule(path), statistics, readers[path])
            weights, said = solve([task_of(path, found[path]) for path in found if path in modules], method)
            for path, weight in weights.items():
                _write(matrix(modules[path]), weight.dequantized(), cuts.get((path, "out")), readers.get(path))
            packed.update(weights)
            notes.extend(said)

    everything = {**modules, **{path: model.get_submodule(path) for path in readers}}
    longest = dict.fromkeys(readers, LONGEST)
    with timed("calibrate"):
        passed = walk.advance_in_stages(
            everything, deal, model.get_submodule, further=further, dense=dense, longest=longest
        )
    if passed is None:
        return None
    cut_block(block, plan)
    for path, weight in packed.items():
        put_packed(model, model.get_submodule(path), weight)
    return passed, notes


def _part(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Some rows and columns of a matrix; None: all."""
    for dim, kept in enumerate((rows, columns)):
        weight = weight if kept is None else weight.index_select(dim, kept.to(weight.device))
    return weight


def _write(weight: Tensor, part: Tensor, rows: Tensor | None, columns: Tensor | None) -> None:
    """Put what `_part` gives into its place, changed."""
    rows, columns = (
        torch.arange(size) if kept is None else kept for size, kept in zip(weight.shape, (rows, columns), strict=True)
    )
    weight[rows.to(weight.device)[:, None], columns.to(weight.device)] = part.to(weight.device, weight.dtype)
