"""How long training may go on, and how far the learning rate has come down by then."""

from __future__ import annotations

import math
import time

WARMUP = 0.05  # of the steps
WARM_STEPS = 10  # where the clock ends it


class Allowance:
    """So many steps, so many seconds, or whichever is over first. The clock starts when it is made.

    The same steps give the same training; seconds do not.

    Args:
        steps, seconds: at least one of them.
    """

    def __init__(self, steps: int | None, seconds: float | None = None) -> None:
        assert steps is not None or seconds is not None
        self.steps, self.seconds = steps, seconds
        self._since = time.monotonic()

    def fraction(self, step: int) -> float:
        """How much is used up before step `step`, 0 to 1."""
        by_steps = 0.0 if self.steps is None else step / self.steps
        by_seconds = 0.0 if self.seconds is None else (time.monotonic() - self._since) / max(self.seconds, 1e-9)
        return min(1.0, max(by_steps, by_seconds))

    def over(self, step: int) -> bool:
        """Whether step `step` must not be taken any more."""
        return self.fraction(step) >= 1.0

    def rate(self, step: int) -> float:
        """What the learning rate is multiplied by in step `step`: a short warm-up, then a cosine down to zero."""
        warm = WARM_STEPS if self.steps is None else max(1, round(self.steps * WARMUP))
        warm = warm if self.seconds is None else min(warm, WARM_STEPS)  # how many steps there will be, nobody knows
        return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * self.fraction(step)))
