"""What long passes have done already, for another process that goes on where one was cut off.

A pass asks `recall()`, which remembers nothing unless the run that it is part of writes things down (`recalling`).
What is asked for must follow from the run's own key (source, recipe, seed, data): it is taken as it was found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Done:
    """What a step of a course has found.

    Attributes:
        said: JSON values.
        tensors: by name; where they are remembered, what comes back lies in a mapped file.
    """

    said: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Any] = field(default_factory=dict)


class Course:
    """Steps that are always done in the same order, of which an earlier process may have done the first."""

    def step(
        self,
        do: Callable[[], Done],
        *,
        modules: Mapping[str, Any] | None = None,
        walks: Mapping[str, Any] | None = None,
    ) -> Done:
        """The next step: done by `do`, or as it was done.

        Args:
            modules: blocks that `do` may change, by the name that they have in the source.
            walks: through a stack, that `do` takes further (None: there is none); they are brought to where they were
                before the first step that has to be done.
        """
        return do()


class Recall:
    """Remembers nothing."""

    def value(self, name: str, key: object, make: Callable[[], T]) -> T:
        """What `make` gives, a JSON value with lists for tuples. `key`: what it depends on, by its `repr`."""
        return make()

    def course(self, name: str) -> Course:
        """A course, whose name no other of the run has."""
        return Course()


_RECALL: ContextVar[Recall] = ContextVar("hf_shrink_recall", default=Recall())  # noqa: B039 - it has no state


def recall() -> Recall:
    """Of the run that is under way."""
    return _RECALL.get()


@contextmanager
def recalling(found: Recall) -> Iterator[None]:
    """Let passes ask `found`."""
    token = _RECALL.set(found)
    try:
        yield
    finally:
        _RECALL.reset(token)
