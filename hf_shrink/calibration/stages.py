"""One pass of a block over all batches that stops wherever matrices get a new input, so that they can be replaced.

The block's own forward runs once for every batch, each in a greenlet of its own (a function that can be left in the
middle and gone on with). Before the first matrix of a stage (the matrices that get the same tensor) a batch waits until
all have come that far. Then the stage is dealt with, and the batches go on through the new matrices: later stages see
what the compressed earlier ones give (true-sequential), and nothing is computed twice.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from hf_shrink.calibration.shelf import Shelf

Run = Callable[[int], Any]  # the block's forward on one batch


class _Passage(greenlet):
    """One batch on its way through the block."""

    def __init__(self, batch: int, run: Run) -> None:
        super().__init__(run)
        self.batch = batch
        self.stage = -1  # the stage in front of which it waits; -1 before the first
        self.input: Tensor | None = None
        self.output: Any = None
        self.seen: dict[int, weakref.ref[Tensor]] = {}

    def held(self) -> list[Tensor]:
        """The inputs that modules got on the way and that still exist."""
        alive = [tensor for reference in self.seen.values() if (tensor := reference()) is not None]
        self.seen = {id(tensor): weakref.ref(tensor) for tensor in alive}
        return alive

    def go(self) -> None:
        """Let it run until it waits in front of the next stage, or ends. Raises what it raises."""
        self.input = None
        self.output = self.switch() if self.stage >= 0 else self.switch(self.batch)

    def wait(self, stage: int, x: Tensor) -> None:
        """Called on the way: leave until the stage has been dealt with."""
        self.stage, self.input = stage, x
        assert self.parent is not None
        # Autocast belongs to the thread: off outside, and on again for this batch when it goes on.
        with torch.autocast(x.device.type, enabled=False):
            self.parent.switch()


class Found(NamedTuple):
    """How a block runs on the first batch.

    Attributes:
        stages: the paths of the matrices that get the same tensor, or are of one phase, in the order they run.
        output: the block's.
        largest: bytes of the largest input of a matrix.
    """

    stages: list[list[str]]
    output: Any
    largest: int


def find_stages(
    matrices: Mapping[str, nn.Module], run: Run, phase: Callable[[str], object | None] = lambda path: None
) -> Found | None:
    """The stages of a block; None when a matrix runs twice or not at all: it cannot be stopped in between then.

    `phase`: equal, and not None, for matrices that get different tensors but are to be one stage (of all experts).
    """
    inputs: list[Tensor] = []
    stages: list[list[str]] = []
    seen: list[str] = []

    def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(path)
            for known, stage in zip(inputs, stages, strict=True):
                if known is args[0] or (phase(path) is not None and phase(path) == phase(stage[0])):
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
    if sorted(seen) != sorted(matrices):
        return None
    return Found(stages, output, max(x.untyped_storage().nbytes() for x in inputs))


class StagedRun:
    """All batches on their way through a block, each stopped in front of one stage after the other.

    A context manager: inside, the matrices wait for their stages and gradients are off; at its end no batch is left
    waiting, whatever was raised.

    Args:
        matrices: the block's, by path, before any is replaced.
        stages: from `find_stages`.
        batches: how many.
        run: the block's forward on one batch.
        current: the module that is at a path now.
        block: whose forward `run` runs. What its modules were given on the way, and is still held somewhere on the
            way, is put on a shelf while the batch rests, since nobody reads it then.
        shelf: that one; None: one of its own.
    """

    def __init__(
        self,
        matrices: Mapping[str, nn.Module],
        stages: Sequence[Sequence[str]],
        batches: int,
        run: Run,
        current: Callable[[str], nn.Module],
        block: nn.Module | None = None,
        shelf: Shelf | None = None,
    ) -> None:
        self._passages = [_Passage(batch, run) for batch in range(batches)]
        self._contexts = ExitStack()
        self._setting = (matrices, stages, current, block)
        self._shelf = Shelf() if shelf is None else shelf

    def __enter__(self) -> StagedRun:
        matrices, stages, current, block = self._setting
        # No forward may set the grad mode on its way in and another restore it on its way out: off for all, all the
        # time.
        self._contexts.enter_context(torch.no_grad())
        self._contexts.enter_context(_waiting(matrices, stages, current))
        self._contexts.enter_context(_noting_inputs(block))
        self._contexts.enter_context(self._shelf)
        self._contexts.callback(self._end)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._contexts.__exit__(kind, error, trace)

    def reach(self, batch: int, stage: int) -> Tensor | None:
        """Let a batch run until it waits in front of `stage`; returns its input there.

        None when it does not come by there: it is past it, or at its end.
        """
        passage = self._passages[batch]
        while not passage.dead and passage.stage < stage:
            self._go(passage)
        if passage.stage != stage or passage.input is None:
            return None
        self._shelf.give_back(batch)  # it may have come here while an earlier stage was due
        return passage.input

    def rest(self, batch: int) -> None:
        """Nobody looks at the batch for a while."""
        passage = self._passages[batch]
        if passage.input is not None:
            self._shelf.take(batch, passage.held())

    def finish(self, batch: int) -> Any:
        """Let a batch run to its end; returns the block's output, which is not kept."""
        passage = self._passages[batch]
        while not passage.dead:
            self._go(passage)
        output, passage.output = passage.output, None
        return output

    def _go(self, passage: _Passage) -> None:
        self._shelf.give_back(passage.batch)
        passage.go()

    def _end(self) -> None:
        for passage in self._passages:
            self._shelf.give_back(passage.batch)
            if passage:  # started and not ended
                passage.throw()


@contextmanager
def _noting_inputs(block: nn.Module | None) -> Iterator[None]:
    """Let every passage note what the block's modules are called with (the first argument, where it is a tensor)."""

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        passage = getcurrent()
        given = args[0] if args else None
        if isinstance(passage, _Passage) and isinstance(given, Tensor) and not isinstance(given, nn.Parameter):
            passage.seen[id(given)] = weakref.ref(given)

    handles = [m.register_forward_pre_hook(note) for m in block.modules()] if block is not None else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _waiting(
    matrices: Mapping[str, nn.Module], stages: Sequence[Sequence[str]], current: Callable[[str], nn.Module]
) -> Iterator[None]:
    """Make every matrix wait for its stage, and then compute with whatever has taken its place."""
    stage_of = {path: index for index, stage in enumerate(stages) for path in stage}
    before = {path: module.__dict__.get("forward") for path, module in matrices.items()}

    def waiting_forward(path: str, module: nn.Module) -> Callable[..., Any]:
        real: Callable[..., Any] = module.forward
        stage = stage_of[path]

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            passage = getcurrent()
            if isinstance(passage, _Passage) and passage.stage < stage:
                passage.wait(stage, x)
            now = current(path)
            return real(x, *args, **kwargs) if now is module else now(x, *args, **kwargs)

        return forward

    for path, module in matrices.items():
        module.forward = waiting_forward(path, module)
    try:
        yield
    finally:
        for path, module in matrices.items():
            old = before[path]
            if old is None:
                del module.forward
            else:
                module.forward = old
