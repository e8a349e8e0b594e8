"""One pass of a block over all batches that stops wherever matrices get a new input, so that they can be replaced.

The block's own forward runs once for every batch, each in a thread of its own; only one thread runs at a time. Before
the first matrix of a stage (the matrices that get the same tensor) a thread waits until all batches have come that
far. Then the stage is dealt with, and the batches go on through the new matrices: later stages see what the compressed
earlier ones give (true-sequential), and nothing is computed twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[int], Any]  # the block's forward on one batch


class _Abandoned(BaseException):
    """Another batch failed; this one need not go on."""


class _Worker:
    """One batch on its way through the block."""

    def __init__(self, batch: int, run: Run) -> None:
        self.batch = batch
        self.stage = -1  # the stage in front of which it waits; -1 before the first
        self.input: Tensor | None = None
        self.output: Any = None
        self.error: BaseException | None = None
        self.finished = False
        self.abandoned = False
        self._run = run
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._main, daemon=True)

    def go(self) -> None:
        """Let it run until it waits in front of the next stage, or ends. Raises what it raised."""
        if self._thread.ident is None:
            self._thread.start()
        self.input = None
        self._turn.release()
        self._back.acquire()
        if self.finished:
            self._thread.join()
        if self.error is not None and not isinstance(self.error, _Abandoned):
            raise self.error

    def abandon(self) -> None:
        """End it where it stands."""
        if self._thread.ident is not None and not self.finished:
            self.abandoned = True
            self.go()

    def wait(self, stage: int, x: Tensor) -> None:
        """Called in the worker's thread: hand the turn back until the stage has been dealt with."""
        self.stage, self.input = stage, x
        self._back.release()
        self._turn.acquire()
        if self.abandoned:
            raise _Abandoned

    def _main(self) -> None:
        self._turn.acquire()
        _CURRENT.worker = self
        try:
            with torch.no_grad():
                self.output = self._run(self.batch)
        except BaseException as error:
            self.error = error
        finally:
            self.finished = True
            self._back.release()


_CURRENT = threading.local()


def find_stages(matrices: Mapping[str, nn.Module], run: Run) -> tuple[list[list[str]], Any] | None:
    """The stages of a block, in the order they run on the first batch, and the block's output for it.

    None when a matrix runs twice or not at all: such a block cannot be stopped in between.
    """
    inputs: list[Tensor] = []
    stages: list[list[str]] = []
    seen: list[str] = []

    def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(path)
            for known, stage in zip(inputs, stages, strict=True):
                if known is args[0]:
                    stage.append(path)
                    return
            inputs.append(args[0])
            stages.append([path])

        return note

    handles = [module.register_forward_pre_hook(hook(path)) for path, module in matrices.items()]
    try:
        output = run(0)
    finally:
        for handle in handles:
            handle.remove()
    return (stages, output) if sorted(seen) == sorted(matrices) else None


def run_in_stages(
    matrices: Mapping[str, nn.Module],
    stages: Sequence[Sequence[str]],
    batches: int,
    run: Run,
    seen: Callable[[int, int, Tensor], None],
    settle: Callable[[int], None],
    current: Callable[[str], nn.Module],
) -> Iterator[Any]:
    """Take all batches through the block, stage by stage; yields its output for each batch.

    Args:
        matrices: the block's, by path, before any is replaced.
        stages: from `find_stages`.
        run: the block's forward on one batch.
        seen: called with (stage, batch, input) when a batch comes to a stage.
        settle: called with a stage once all batches have come to it; may replace its matrices in the model.
        current: the module that is at a path now.

    Raises:
        What the forward, `seen` or `settle` raise; no batch is left waiting then.
    """
    workers = [_Worker(batch, run) for batch in range(batches)]
    with _waiting(matrices, stages, current):
        try:
            for stage in range(len(stages)):
                for worker in workers:
                    while not worker.finished and worker.stage < stage:
                        worker.go()
                    if not worker.finished and worker.stage == stage and worker.input is not None:
                        seen(stage, worker.batch, worker.input)
                settle(stage)
            for worker in workers:
                while not worker.finished:
                    worker.go()
                yield worker.output
                worker.output = None
        finally:
            for worker in workers:
                worker.abandon()


@contextmanager
def _waiting(
    matrices: Mapping[str, nn.Module], stages: Sequence[Sequence[str]], current: Callable[[str], nn.Module]
) -> Iterator[None]:
    """Make every matrix wait for its stage, and then compute with whatever has taken its place."""
    stage_of = {path: index for index, stage in enumerate(stages) for path in stage}
    before = {path: module.__dict__.get("forward") for path, module in matrices.items()}

    def waiting_forward(path: str, module: nn.Module) -> Callable[..., Any]:
        real, stage = module.forward, stage_of[path]

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            worker: _Worker | None = getattr(_CURRENT, "worker", None)
            if worker is not None and worker.stage < stage:
                worker.wait(stage, x)
            now = current(path)
            return real(x, *args, **kwargs) if now is module else now(x, *args, **kwargs)

        return forward

    for path, module in matrices.items():
        module.forward = waiting_forward(path, module)
    try:
        yield
    finally:
        for path, module in matrices.items():
            if before[path] is None:
                del module.forward
            else:
                module.forward = before[path]
