"""Where a run's time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Clock:
    """Adds up seconds by phase."""

    seconds: dict[str, float]
    _phases: list[str] = field(default_factory=list)
    _since: float = 0.0

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
            self.seconds[self._phases[-1]] = self.seconds.get(self._phases[-1], 0.0) + now - self._since
        if phase is None:
            self._phases.pop()
        else:
            self._phases.append(phase)
        self._since = now
