"""Which tokens of a vocabulary are kept, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_shrink.errors import RecipeError


@dataclass(frozen=True)
class VocabularyPlan:
    """What is kept of the vocabulary.

    Attributes:
        rows: of the source's embedding.
        kept: ids of the kept tokens in the source, ascending, as ranges: "0-257,300,305-309". They are numbered from 0
            in this order; ids from `rows` on are tokens that only the tokenizer knows.
        tokenizer: SHA-256 of the source tokenizer's tokens and their ids.
    """

    rows: int
    kept: str
    tokenizer: str

    @property
    def ids(self) -> tuple[int, ...]:
        """The kept ids. Raises RecipeError where `kept` says none."""
        try:
            parts = [tuple(map(int, part.split("-"))) for part in self.kept.split(",")]
            found = tuple(i for part in parts for i in range(part[0], part[-1] + 1))
        except ValueError as error:
            raise RecipeError(f"the plan's kept tokens are not ranges of ids: {error}") from error
        if list(found) != sorted(set(found)) or found[0] < 0:
            raise RecipeError("the plan's kept tokens must be ascending ids, each once")
        return found


def ranges(numbers: Sequence[int], separator: str = ", ") -> str:
    """Ascending numbers, (0, 1, 2, 5) as "0-2, 5"."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return separator.join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
