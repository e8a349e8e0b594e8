"""Solve matrices that share an input as one, and put the packed modules in their places."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hf_shrink.architectures.linears import is_matrix, matrix
from hf_shrink.calibration.looked_up import also_looked_up
from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.errors import CalibrationError, RecipeError
from hf_shrink.ops.columns import ROW_MULTIPLE
from hf_shrink.pipeline.tied import weight_holders
from hf_shrink.plan import Scheme
from hf_shrink.quantization.base import METHODS, ModelMethod, QuantizationMethod, QuantizedWeight
from hf_shrink.residence.trim import release_free_memory
from hf_shrink.runtime.embedding import CompressedEmbedding
from hf_shrink.runtime.linear import CompressedLinear
from hf_shrink.runtime.packed import PackedModule
from hf_shrink.runtime.sharing import share
from hf_shrink.sharding import ranks, spread

AT_ONCE = 1 << 24  # elements that are solved at a time of a weight that no other is solved with
TALL = 4  # of a weight with statistics, at least so many times as many rows as columns
EACH = 4  # groups of weights for each of several processes at a time


@dataclass(frozen=True)
class Task:
    """One weight to be stored in few bits.

    Attributes:
        statistics: None for data-free methods and embeddings.
        sparse: the weight was pruned; its zeros stay exactly zero.
        weight: (out, in), what is stored where that is not the module's own.
    """

    path: str
    module: nn.Module
    scheme: Scheme
    statistics: InputStatistics | None
    scale_dtype: torch.dtype
    sparse: bool = False
    weight: Tensor | None = None


def solve_and_pack(model: nn.Module, tasks: Sequence[Task], method: QuantizationMethod) -> list[str]:
    """Replace every task's module by its packed form; returns notes.

    Weights that see the same input under the same scheme (query, key and value; gate and up) are solved as one matrix:
    their rows are independent given the statistics, so the result is the same and the factorisation is done once.
    Modules that share one weight are solved once.
    """
    notes: list[str] = []
    groups = _groups(tasks, method)
    step = 1 if ranks().size == 1 else EACH * ranks().size  # what is solved need not be in memory all at once
    for start in range(0, len(groups), step):
        some = groups[start : start + step]
        for group, solved in zip(some, _solved(some, method), strict=True):
            notes += _notes(group, solved)
            for task, weight in _each(group, solved):
                put_packed(model, task.module, weight)
        release_free_memory()
    return notes


def solve(tasks: Sequence[Task], method: QuantizationMethod) -> tuple[dict[str, QuantizedWeight], list[str]]:
    """The tasks' weights on their grids, by path, and notes; as in `solve_and_pack`, but nothing is replaced."""
    groups = _groups(tasks, method)
    solved = _solved(groups, method) if groups else []
    found = {task.path: own for group, s in zip(groups, solved, strict=True) for task, own in _each(group, s)}
    return found, [note for group, s in zip(groups, solved, strict=True) for note in _notes(group, s)]


def _notes(group: Sequence[Task], solved: QuantizedWeight) -> list[str]:
    return [f"{group[0].path}: {note}" for note in solved.notes]


def _each(group: Sequence[Task], solved: QuantizedWeight) -> Iterator[tuple[Task, QuantizedWeight]]:
    """A group's tasks, each with its own part of what was solved as one."""
    start = 0
    for task in group:
        stop = start + len(_dense(task))
        yield task, solved.rows(start, stop) if len(group) > 1 else solved
        start = stop


def _solved(groups: Sequence[Sequence[Task]], method: QuantizationMethod) -> list[QuantizedWeight]:
    """The groups' weights on their grids. Each is solved by one process; a single one by all of them together, as far
    as the method knows how to."""

    def solve(group: Sequence[Task]) -> QuantizedWeight:
        first = group[0]
        solver = method if first.statistics is not None or not method.needs_statistics else _data_free()
        if len(group) == 1 and (first.statistics is None or first.statistics.drift is None):
            return solve_alone(solver, first)
        return _solve(solver, torch.cat([_weight(task) for task in group]), first)

    return [solve(groups[0])] if len(groups) == 1 else spread(groups, solve, [_cost(group) for group in groups])


def _cost(group: Sequence[Task]) -> float:
    """How long a group takes, in proportion."""
    width = _dense(group[0]).shape[1]
    return float(sum(len(_dense(task)) for task in group) * width * width)


def put_packed(model: nn.Module, module: nn.Module, weight: QuantizedWeight) -> None:
    """Replace a module, and every other one of the model that holds its weight (tied ones), by its packed form."""
    paths = weight_holders(model)[id(module.weight)]
    holders = {path: _packed(model.get_submodule(path), weight) for path in paths}
    for path, holder in holders.items():
        model.set_submodule(path, holder)
    if len(holders) > 1:
        share(*holders.values())


def solve_alone(method: QuantizationMethod, task: Task) -> QuantizedWeight:
    """One weight on its grid: rows are independent, so that one larger than all else goes in slices."""
    weight, statistics = _dense(task), task.statistics
    step = max(1, AT_ONCE // weight.shape[1])
    if statistics is not None:  # every slice factors them again
        step = max(step // ROW_MULTIPLE, TALL * weight.shape[1] // ROW_MULTIPLE) * ROW_MULTIPLE
    if len(weight) <= step or task.scheme.strategy == "tensor":
        return _solve(method, _weight(task), task)
    parts, sizes = [], []
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        part = _weight(task, rows)
        parts.append(_solve(method, part, task))
        outputs = part if statistics is None else part @ statistics.mean.to(part.device)
        sizes.append(float((outputs * part).sum(dtype=torch.float64)))
    return replace(QuantizedWeight.stacked(parts, sizes), sparse=task.sparse)


def _solve(method: QuantizationMethod, weight: Tensor, task: Task) -> QuantizedWeight:
    """The weight on its grid. Raises RecipeError where a method does not keep what must be zero."""
    kept = weight != 0 if task.sparse else None
    solved = method.solve(weight, task.scheme, task.statistics, scale_dtype=task.scale_dtype, kept=kept)
    if kept is None:
        return solved
    if solved.dequantized().masked_fill(kept, 0.0).any():
        raise RecipeError(
            f"{type(method).__name__} does not keep the zeros of {task.path}; quantize pruned weights with gptq or rtn"
        )
    return replace(solved, sparse=True)


def _groups(tasks: Sequence[Task], method: QuantizationMethod) -> list[list[Task]]:
    """Tasks that are solved together; of several modules with one weight only one is solved."""
    groups: dict[object, list[Task]] = {}
    for task in _once(tasks):
        together = task.statistics is not None and task.scheme.strategy != "tensor"
        key = (id(task.statistics), task.scheme, task.scale_dtype, task.sparse) if together else task.path
        groups.setdefault(key, []).append(task)
    _count_corrections([group[0] for group in groups.values()])
    return list(groups.values())


def _count_corrections(firsts: Iterable[Task]) -> None:
    """Let drifts know how many groups, of which these are the first tasks, are corrected by them at most."""
    drifts = [task.statistics.drift for task in firsts if task.statistics is not None]
    for drift in drifts:
        if drift is not None and drift.corrections is None:
            drift.corrections = sum(drift is other for other in drifts)


def _once(tasks: Sequence[Task]) -> list[Task]:
    """One task for each weight: of a head that is tied to its embedding the head's, which has statistics."""
    holders: dict[int, list[Task]] = {}
    for task in tasks:
        holders.setdefault(id(task.module.weight), []).append(task)
    found = []
    for tied in holders.values():
        task = next((t for t in tied if t.statistics is not None), tied[0])
        if task.statistics is not None and any(isinstance(t.module, nn.Embedding) for t in tied):
            task = replace(task, statistics=also_looked_up(task.statistics))
        found.append(task)
    return found


def _dense(task: Task) -> Tensor:
    """The weight (out, in) that is to be stored."""
    if task.weight is not None:
        return task.weight
    module = task.module
    weight = matrix(module) if is_matrix(module) else module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _weight(task: Task, rows: slice = slice(None)) -> Tensor:
    """float32 (out, in) of some rows. Raises CalibrationError naming the module when it is not finite."""
    dense = _dense(task)[rows].to(torch.float32)
    if not torch.isfinite(dense).all():
        raise CalibrationError(f"NaN or Inf in {task.path}.weight; the checkpoint is damaged")
    return dense


def _data_free() -> QuantizationMethod:
    """What stands in where a method needs statistics and there are none by nature: embeddings."""
    method = METHODS.build("rtn", {})
    assert not isinstance(method, ModelMethod)
    return method


def _packed(module: nn.Module, weight: QuantizedWeight) -> PackedModule:
    if isinstance(module, nn.Embedding):
        return CompressedEmbedding.from_quantized(weight, module.padding_idx)
    bias = getattr(module, "bias", None)
    return CompressedLinear.from_quantized(weight, bias if isinstance(bias, nn.Parameter) else None)


def tied_partner_missing(model: nn.Module, schemes: Mapping[str, Scheme]) -> set[str]:
    """Paths in `schemes` whose weight is shared with a module that is not in `schemes`: these are untied first."""
    return {path for paths in weight_holders(model).values() if not schemes.keys() >= set(paths) for path in paths} & (
        schemes.keys()
    )


def untie(model: nn.Module, paths: set[str]) -> None:
    """Give each of these modules a weight of its own, so that packing it leaves its partner dense."""
    for path in paths:
        module = model.get_submodule(path)
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        module.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
