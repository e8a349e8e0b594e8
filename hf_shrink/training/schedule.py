"""When a model is pruned while it is trained: a window of optimizer steps, and how far one is in it."""

from __future__ import annotations

from dataclasses import dataclass

from hf_shrink.errors import RecipeError

UPDATES = 50  # of the masks within the window, where nobody says how often


@dataclass(frozen=True)
class Window:
    """The steps in which masks change.

    Steps are counted as in `TrainerState.global_step`: step 1 is the first optimizer step.

    Attributes:
        start: the last step before masks change.
        end: the step after which they are what they will be.
        every: how many steps lie between two changes.
    """

    start: int
    end: int
    every: int

    def progress(self, step: int) -> float:
        """From 0 at the start to 1 at the end, fast at first: 1 - (1 - t)³ (Zhu & Gupta, arXiv 1710.01878)."""
        t = min(max((step - self.start) / (self.end - self.start), 0.0), 1.0)
        return float(1 - (1 - t) ** 3)

    def due(self, step: int) -> bool:
        """Whether masks change after this step."""
        return self.start < step <= self.end and ((step - self.start) % self.every == 0 or step == self.end)


@dataclass(frozen=True)
class Schedule:
    """The window as the user says it.

    Attributes:
        start, end: fractions of all optimizer steps; 0 <= start <= end <= 1.
        every: steps between two changes; None: about 50 changes in all.

    Raises:
        RecipeError: these do not make a window.
    """

    start: float = 0.1
    end: float = 0.7
    every: int | None = None

    def __post_init__(self) -> None:
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (self.start, self.end))
        if not numbers or not 0 <= self.start <= self.end <= 1:
            raise RecipeError(
                f"start and end are fractions of the training with 0 <= start <= end <= 1, not {self.start!r} and "
                f"{self.end!r}"
            )
        if self.every is not None and (
            not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1
        ):
            raise RecipeError(f"every is a whole number of optimizer steps of at least 1, not {self.every!r}")

    def window(self, max_steps: int) -> Window:
        """The window of a training of so many optimizer steps; it has at least one step."""
        end = max(round(self.end * max_steps), 1)
        start = min(round(self.start * max_steps), end - 1)
        return Window(start, end, self.every or max((end - start) // UPDATES, 1))
