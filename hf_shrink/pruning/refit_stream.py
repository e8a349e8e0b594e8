"""Refit a model whose residual stream was cut: block by block, against the dense model that runs beside it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_shrink.architectures.bound import BoundBlock, BoundStack
from hf_shrink.architectures.linears import matrix
from hf_shrink.architectures.residual import Reader, ResidualStream
from hf_shrink.calibration.precision import float32_for_now, in_float32
from hf_shrink.calibration.stages import StagedRun, find_stages
from hf_shrink.calibration.statistics import shortening
from hf_shrink.calibration.walk import StackWalk
from hf_shrink.ops.linalg import refit_towards
from hf_shrink.progress import ProgressCallback, quiet
from hf_shrink.pruning.refit import DAMPING, LONGEST
from hf_shrink.residence import forget, rest, twin
from hf_shrink.sharding import Share
from hf_shrink.surgery.hidden import Slice

ROWS = 8192  # of a matrix that are refitted at a time


class DenseCopy:
    """The dense blocks and what runs through them, kept while the model itself is cut.

    Args:
        model: before anything of it is cut.
    """

    def __init__(
        self, model: PreTrainedModel, stack: BoundStack, stream: ResidualStream, batches: Sequence[Mapping[str, Any]]
    ) -> None:
        modules = [block.module for block in stack.blocks]
        self.walk = StackWalk(model, modules, batches)
        self.blocks = [twin(module) for module in modules]
        last = stream.readers[-1]
        self.norm = copy.deepcopy(model.get_submodule(last.norm))
        self.heads = {} if stream.tied else {path: matrix(model.get_submodule(path)).clone() for path in last.matrices}


def refit_stream(
    model: PreTrainedModel,
    stack: BoundStack,
    stream: ResidualStream,
    dense: DenseCopy,
    how: Slice,
    batches: Sequence[Mapping[str, Any]],
    progress: ProgressCallback = quiet,
) -> list[str]:
    """Refit readers and writers of the cut stream by least squares, in the order in which they run; returns notes.

    A reader is fitted to what the dense one makes of its own input; a writer to what brings the stream nearest to the
    cut of the dense one, so that it makes up for what earlier blocks have lost.

    Args:
        stack: of the model after the cut.

    Raises:
        CalibrationError: numbers that are not finite.
    """
    walk = StackWalk(model, [block.module for block in stack.blocks], batches)
    skipped = []
    for block, before in zip(stack.blocks, dense.blocks, strict=True):
        progress("refitting the residual stream", block.index, len(stack.blocks))
        readers = [reader for reader in stream.readers if reader.norm.startswith(block.path + ".")]
        dense.walk.stand_in(before)
        with float32_for_now(before), in_float32(block.module):
            if not _refit_block(model, block, readers, before, dense.walk, walk, how):
                skipped.append(block.path)
                for one in (dense.walk, walk):
                    one.advance()
        forget(before, block.module)
        rest(block.module)
    progress("refitting the residual stream", len(stack.blocks), len(stack.blocks))
    _refit_heads(model, stream.readers[-1], dense, walk)
    return [f"{path} was not refitted: its matrices do not run one after the other" for path in skipped]


def _refit_block(
    model: PreTrainedModel,
    block: BoundBlock,
    readers: Sequence[Reader],
    before: nn.Module,
    dense: StackWalk,
    walk: StackWalk,
    how: Slice,
) -> bool:
    """Refit one block and send both streams through it; False, with nothing done, where it cannot be stopped."""
    assert block.attention is not None and block.mlp is not None
    writers = block.attention.slot("output").path, block.mlp.slot("down").path
    paths = [*readers[0].matrices, writers[0], *readers[-1].matrices, writers[1]]
    matrices = {path: model.get_submodule(path) for path in paths}
    found = find_stages(matrices, walk.call) if len(readers) == 2 else None
    expected = [sorted(readers[0].matrices), [writers[0]], sorted(readers[1].matrices), [writers[1]]]
    if found is None or [sorted(stage) for stage in found.stages] != expected:
        return False

    def dense_one(path: str) -> nn.Module:
        return before.get_submodule(path.removeprefix(block.path + "."))

    entering = list(dense.hidden)
    middle = _through(dense, dense_one(readers[1].norm))
    streams = [[how.stream(h) for h in middle], [how.stream(h) for h in dense.hidden]]  # after attention, after MLP
    inside: list[Tensor] = list(walk.hidden)  # the cut stream in front of the part that runs

    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        latest[:] = [args[0]]

    latest: list[Tensor] = []
    handle = model.get_submodule(readers[1].norm).register_forward_pre_hook(note)
    try:
        with StagedRun(matrices, found.stages, len(walk.hidden), walk.call, model.get_submodule, block.module) as run:
            for stage, part in enumerate((0, 0, 1, 1)):
                reads = stage in (0, 2)
                source = entering if stage == 0 else middle
                sums = _Sums()
                for batch in range(len(walk.hidden)):
                    given = run.reach(batch, stage)
                    assert given is not None
                    if stage == 2:
                        inside[batch] = latest[0]
                    missing = streams[part][batch] - inside[batch] - _bias(model.get_submodule(writers[part]))
                    target = dense_one(readers[part].norm)(source[batch]) if reads else missing
                    real = walk.real_tokens(batch)
                    sums.add(real(given), real(target))
                    run.rest(batch)
                sums.merge(walk.share)
                for path in found.stages[stage]:
                    through = matrix(dense_one(path)).float() if reads else None
                    _refit(model.get_submodule(path), sums, through)
            for batch in range(len(walk.hidden)):
                walk.take(batch, run.finish(batch))
    finally:
        handle.remove()
    walk.step()
    return True


def _through(walk: StackWalk, norm: nn.Module) -> list[Tensor]:
    """Send a walk through its block; returns what the norm inside it was given, by batch."""
    seen: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        walk.advance()
    finally:
        handle.remove()
    return seen


def _bias(module: nn.Module) -> Tensor | float:
    return module.bias.data if isinstance(module.bias, nn.Parameter) else 0.0


class _Sums:
    """Second moments of an input x, and of a target y with it."""

    def __init__(self) -> None:
        self._moment: Tensor | None = None
        self._cross: Tensor | None = None
        self._tokens = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add a batch: (..., in) and (..., target). Tokens with massive activations are shortened, see `LONGEST`."""
        x, y = (part.reshape(-1, part.shape[-1]).float() for part in (x, y))
        factor = torch.minimum(shortening(x, LONGEST), shortening(y, LONGEST))
        x, y = x * factor, y * factor
        moment, cross = x.T @ x, y.T @ x
        self._moment = moment if self._moment is None else self._moment + moment
        self._cross = cross if self._cross is None else self._cross + cross
        self._tokens += len(x)

    def merge(self, share: Share) -> None:
        """From sums over this process's tokens to sums over all."""
        assert self._moment is not None and self._cross is not None
        share.add_up(self._moment, self._cross)
        self._tokens = int(share.totals([self._tokens])[0])

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """E x x^T (in, in) and E y x^T (target, in)."""
        assert self._moment is not None and self._cross is not None
        return self._moment / max(self._tokens, 1), self._cross / max(self._tokens, 1)


def _refit(module: nn.Module, sums: _Sums, through: Tensor | None) -> None:
    """Fit a matrix, its bias aside. `through`: the dense matrix whose outputs count, where targets are its inputs."""
    moment, cross = sums.means
    weight = matrix(module)
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        wanted = cross[rows] if through is None else through[rows] @ cross
        weight[rows] = refit_towards(weight[rows], wanted, moment, DAMPING).to(weight.dtype)


def _refit_heads(model: PreTrainedModel, reader: Reader, dense: DenseCopy, walk: StackWalk) -> None:
    """Fit heads with a weight of their own to what the dense ones make of the dense stream."""
    norm = model.get_submodule(reader.norm)
    sums = _Sums()
    with torch.no_grad():
        for batch, hidden in enumerate(walk.hidden if dense.heads else ()):
            real = walk.real_tokens(batch)
            sums.add(real(norm(hidden)), real(dense.norm(dense.walk.hidden[batch])))
    if dense.heads:
        sums.merge(walk.share)
    for path, weight in dense.heads.items():
        _refit(model.get_submodule(path), sums, weight.float())
