"""The processes of a run. Code that works with them reads the same for one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# What launchers set to the number of processes that they started: torchrun and accelerate, then several MPIs.
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


class ProcessLost(RuntimeError):
    """Another process of the run is gone, so that this one cannot go on."""


class Ended(KeyboardInterrupt):
    """The launcher ends this process."""


class Ranks:
    """The processes that work on a run together. As it stands here: one, which does it all.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
        device: the accelerator that this process was given; None where it has none of its own.
    """

    rank = 0
    size = 1
    device: torch.device | None = None

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank; tensors in it come to the device that this process has."""
        return [value]

    def from_first(self, value: T) -> T:
        """The first process's value."""
        return value

    def on_first(self, work: Callable[[], T]) -> T:
        """What the first process gets from `work`, which only it does; a ShrinkError is raised by all."""
        return work()

    def add_up(self, *tensors: Tensor) -> None:
        """Make tensors the sums of all processes' ones, in place: rank by rank, so that all hold the same bits."""

    def highest(self, *tensors: Tensor) -> None:
        """Make tensors the elementwise maxima of all processes' ones, in place."""

    def copy_first(self, *tensors: Tensor) -> None:
        """Make tensors those of the first process, in place."""

    def wait(self) -> None:
        """Go on when all processes are here."""

    def complain(self, line: str) -> None:
        """Say on stderr what went wrong, where no other process has said something before."""
        print(line, file=sys.stderr, flush=True)

    def leave(self) -> None:
        """All work is done, and this process is about to end."""


ALONE = Ranks()
_scopes: list[Ranks] = []


def ranks() -> Ranks:
    """The processes that work together here: several only inside `together`."""
    return _scopes[-1] if _scopes else ALONE


@contextmanager
def together() -> Iterator[Ranks]:
    """Work inside with the processes that were started beside this one, if any were; all of them must come here.

    Inside another scope that one goes on.
    """
    if _scopes:
        yield _scopes[-1]
    else:
        with _scope(_started()) as found:
            yield found


@contextmanager
def alone() -> Iterator[None]:
    """Work inside without the others, who may do something else meanwhile."""
    with _scope(ALONE):
        yield


@contextmanager
def _scope(found: Ranks) -> Iterator[Ranks]:
    _scopes.append(found)
    try:
        yield found
    finally:
        _scopes.pop()


def _started() -> Ranks:
    """All processes that a launcher started, or that the caller's own code has put into a process group."""
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not grouped and max(int(os.environ.get(name) or 1) for name in SIZES) < 2:
        return ALONE
    from hf_shrink.sharding.several import find_several  # accelerate takes a second to import

    return find_several() or ALONE
