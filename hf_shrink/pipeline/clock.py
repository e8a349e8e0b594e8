"""Wall time by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Adds the time that passes in each phase to a report's `seconds`."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self._phases: list[str] = []
        self._since = 0.0

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Count the time inside for `phase`; a phase inside another one stops the other's clock."""
        self._switch(phase)
        try:
            yield
        finally:
            self._switch(None)

    def _switch(self, phase: str | None) -> None:
        now = time.perf_counter()
        if self._phases:
            last = self._phases[-1]
            self._seconds[last] = self._seconds.get(last, 0.0) + now - self._since
        if phase is None:
            self._phases.pop()
        else:
            self._phases.append(phase)
        self._since = now
