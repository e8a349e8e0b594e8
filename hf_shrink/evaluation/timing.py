"""Wall and CPU seconds of generation and of forward passes.

Nothing of this package is imported here, so that the benchmarks can load the file where other tools are installed and
this package is not: everyone is timed by the same code.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers import CompileConfig
from transformers.generation.streamers import BaseStreamer

T = TypeVar("T")


@dataclass(frozen=True)
class Seconds:
    """A point in time, or the time between two of them, in seconds.

    Attributes:
        wall: as the clock on the wall shows.
        cpu: of all threads of this process together.
    """

    wall: float
    cpu: float

    def __sub__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall - other.wall, self.cpu - other.cpu)


def now(device: torch.device | None = None) -> Seconds:
    """The clocks, once the accelerator has finished what it was given: it works behind the caller's back.

    Args:
        device: where the work is; None: the current accelerator, if there is one.
    """
    if torch.accelerator.is_available() and (device is None or device.type != "cpu"):
        torch.accelerator.synchronize(device)
    return Seconds(time.perf_counter(), time.process_time())


@dataclass(frozen=True)
class Generation:
    """How long one call of `generate` took.

    Attributes:
        first: from the call to the first new token: the prompt is read.
        rest: of all further tokens together.
    """

    first: Seconds
    rest: Seconds


class _TokenClock(BaseStreamer):
    """Looks at the clocks whenever `generate` hands over the prompt or a new token."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Seconds] = []

    def put(self, value: torch.Tensor) -> None:
        self.marks.append(now(self.device))

    def end(self) -> None:
        pass


@torch.no_grad()
def time_generation(model: Any, inputs: Mapping[str, torch.Tensor], config: Any) -> Generation:
    """Time one `model.generate`.

    Args:
        model: a model that generates.
        inputs: what it reads, on its device.
        config: a GenerationConfig that makes the same number of tokens every time.
    """
    clock = _TokenClock(next(iter(inputs.values())).device)
    start = now(clock.device)
    model.generate(**inputs, generation_config=config, streamer=clock)
    first, last = clock.marks[1], clock.marks[-1]  # before these comes the prompt
    return Generation(first - start, last - first)


@torch.no_grad()
def time_call(run: Callable[[], object], device: torch.device | None = None) -> Seconds:
    """Time one call without gradients. `device`: as of `now`."""
    start = now(device)
    run()
    return now(device) - start


def compiled(config: Any) -> Any:
    """Change a GenerationConfig so that `generate` compiles the decode step, in one graph, on a static cache.

    On CUDA the graph is replayed as a whole (CUDA graphs).
    """
    config.cache_implementation = "static"
    mode = "reduce-overhead" if torch.cuda.is_available() else "default"
    config.compile_config = CompileConfig(fullgraph=True, mode=mode)
    config.compile_config._compile_all_devices = True  # otherwise only on accelerators
    return config


def was_compiled(model: Any) -> bool:
    """Whether `generate` did compile: it only warns where model or cache do not allow it."""
    return hasattr(model, "_compiled_call")


def in_turn(
    runs: Mapping[str, Callable[[], T]], repeats: int, after_each: Callable[[], object] = lambda: None
) -> dict[str, list[T]]:
    """Call all of `runs` one after the other, `repeats` times, so that a busy machine slows all alike.

    Returns:
        What each returned, in order.
    """
    results: dict[str, list[T]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            results[name].append(run())
            after_each()
    return results
