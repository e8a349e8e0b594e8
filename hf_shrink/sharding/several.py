"""Several processes, through accelerate: NCCL between GPUs, gloo between CPUs."""

from __future__ import annotations

import functools
import io
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import (
    InitProcessGroupKwargs,
    broadcast,
    broadcast_object_list,
    gather,
    gather_object,
    str_to_bool,
)
from torch import Tensor

from hf_shrink.errors import ShrinkError
from hf_shrink.sharding.ranks import ProcessLost, Ranks, alone

T = TypeVar("T")
AT_ONCE = 1 << 24  # elements that are exchanged at a time
SAID = "hf_shrink/said"  # how many processes have something to complain of, in torch's store
KEPT_BY_LAUNCHER = "TORCHELASTIC_USE_AGENT_STORE"  # torchrun's word for who keeps that; else the first process does
PATIENCE = 5.0  # seconds
LONG = timedelta(days=7)  # others may have to wait while one tunes; who is gone is noticed at once


def find_several() -> Several | None:
    """The processes that were started with this one; None where accelerate finds it alone."""
    wanted = str_to_bool(os.environ.get("ACCELERATE_USE_CPU", "false"))
    kwargs = InitProcessGroupKwargs(timeout=LONG).to_kwargs()
    state = PartialState(cpu=bool(wanted) or not torch.accelerator.is_available(), **kwargs)
    return Several(state) if state.num_processes > 1 else None


class Several(Ranks):
    """See `Ranks`."""

    def __init__(self, state: PartialState) -> None:
        self._device: torch.device = state.device
        self.device = None if self._device.type == "cpu" else self._device
        self._state = state
        self.rank, self.size = state.process_index, state.num_processes

    def gather(self, value: T) -> list[T]:
        with self._noticing():
            found = gather_object([_packed(value)])
        return [value if rank == self.rank else self._unpacked(part) for rank, part in enumerate(found)]

    def from_first(self, value: T) -> T:
        content: list[Any] = [_packed(value) if self.first else None]
        with self._noticing():
            broadcast_object_list(content)
        return value if self.first else cast(T, self._unpacked(content[0]))

    def on_first(self, work: Callable[[], T]) -> T:
        result: T | ShrinkError | None = None
        if self.first:
            try:
                with alone():
                    result = work()
            except ShrinkError as error:
                result = error
        result = self.from_first(result)
        if isinstance(result, ShrinkError):
            raise result
        return cast(T, result)

    def add_up(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            self._combine(tensor, torch.add)

    def highest(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            self._combine(tensor, torch.maximum)

    def _combine(self, tensor: Tensor, two: Callable[[Tensor, Tensor], Tensor]) -> None:
        """All processes' tensors, one rank after the other; an all-reduce would leave the order to the library."""
        flat = tensor.detach().reshape(-1)
        for part in torch.split(flat, AT_ONCE):
            with self._noticing():
                found: Tensor = gather(part.to(self._device))
            part.copy_(functools.reduce(two, found.view(self.size, -1)))
        tensor.detach().copy_(flat.view_as(tensor))

    def copy_first(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            there = tensor.detach().to(self._device).contiguous()
            with self._noticing():
                # As bytes: neither library moves every dtype.
                broadcast(there.reshape(-1).view(torch.uint8))
            tensor.detach().copy_(there)

    def wait(self) -> None:
        with self._noticing():
            self._state.wait_for_everyone()

    def complain(self, line: str) -> None:
        store = torch.distributed.distributed_c10d._get_default_store()
        try:
            said_before = store.add(SAID, 1) > 1
        except RuntimeError:  # the first process kept count, and is gone, without a word: else it would have waited
            said_before = self.rank != 1
        if not said_before:
            super().complain(line)
        if self.first and os.environ.get(KEPT_BY_LAUNCHER) != "True":
            self._state.destroy_process_group()  # so that the others notice
            until = time.monotonic() + PATIENCE
            while store.add(SAID, 0) < self.size and time.monotonic() < until:
                time.sleep(0.05)

    def leave(self) -> None:
        self.wait()
        self._state.destroy_process_group()

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        """Raises ProcessLost where the exchange inside fails, which it does when somebody is gone."""
        try:
            yield
        except RuntimeError as error:
            raise ProcessLost(
                f"another of the {self.size} processes ended before its work was done (killed, or out of memory?); "
                "what is finished is kept: start the same command again to go on"
            ) from error

    def _unpacked(self, content: bytes) -> Any:
        def place(storage: Any, location: str) -> Any:
            return storage if location == "cpu" else storage.to(self._device)

        # Written by the same program a moment ago, in a process of the same run.
        return torch.load(io.BytesIO(content), map_location=place, weights_only=False)


def _packed(value: object) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()
