"""Second moments of the inputs of a block's matrices, added up by hooks while the block runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from hf_shrink.calibration.merging import merged
from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.errors import CalibrationError
from hf_shrink.sharding import Share


class LastInputSeen(Exception):
    """The last matrix of the block has its input; the rest of the block's forward is not needed."""


class Collector:
    """Adds up the inputs of a block's matrices while it runs.

    Args:
        longest: as of `InputStatistics`.
        whole: the block runs to its end; otherwise no further than to its last matrix, once that is known.
    """

    def __init__(self, matrices: Mapping[str, nn.Module], longest: float | None = None, whole: bool = False) -> None:
        self._longest = longest
        self._whole = whole
        self._matrices = dict(matrices)
        self._shared: dict[str, str] = {}  # path -> the path whose statistics it uses
        self._statistics: dict[str, InputStatistics] = {}
        self._order: list[str] = []
        self._last: str | None = None

    def listening(self, real_tokens: Callable[[Tensor], Tensor]) -> ExitStack:
        seen: list[tuple[Tensor, str]] = []
        stack = ExitStack()
        first = self._last is None

        def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def add(_: nn.Module, args: tuple[Any, ...]) -> None:
                x = args[0]
                if first:
                    self._join(path, x, seen)
                owner = self._shared[path]
                if owner == path:
                    with torch.autocast(x.device.type, enabled=False):
                        self._statistics[path].add(real_tokens(x))
                if path == self._last and not self._whole:
                    raise LastInputSeen

            return add

        for path, module in self._matrices.items():
            stack.callback(module.register_forward_pre_hook(hook(path)).remove)
        stack.callback(self._settle)
        return stack

    def _join(self, path: str, x: Tensor, seen: list[tuple[Tensor, str]]) -> None:
        if path in self._shared:  # a matrix that runs twice in one forward adds to what it has
            return
        self._order.append(path)
        for other, owner in seen:
            if other is x:
                self._shared[path] = owner
                return
        self._shared[path] = path
        self._statistics[path] = InputStatistics.empty(x.shape[-1], x.device, self._longest)
        seen.append((x, path))

    def _settle(self) -> None:
        if self._last is None and self._order:
            self._last = self._order[-1]

    def finish(self, share: Share, without: Callable[[str], bool] = lambda path: False) -> dict[str, InputStatistics]:
        """The statistics by path, of all matrices but those `without`. Raises CalibrationError.

        Args:
            share: which batches were listened to here; what comes back is of all.
        """
        own = {p: self._statistics[self._shared[p]] if p in self._shared else None for p in self._matrices}
        finished: set[int] = set()
        found: dict[str, InputStatistics] = {}
        for path, statistics in merged(own, share).items():
            if statistics is None:
                raise CalibrationError(f"{path} saw no calibration tokens; give more or other calibration data")
            if not without(path):
                found[path] = statistics if id(statistics) in finished else statistics.finish(path)
                finished.add(id(statistics))
        return found
