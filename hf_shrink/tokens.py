"""Which tokens of a vocabulary are kept, as data."""

from __future__ import annotations

from dataclasses import dataclass

from hf_shrink.errors import RecipeError
from hf_shrink.ranges import from_ranges
from hf_shrink.values import is_whole


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

    def __post_init__(self) -> None:
        if not is_whole(self.rows) or not isinstance(self.kept, str) or not isinstance(self.tokenizer, str):
            raise RecipeError("of a vocabulary, rows is a whole number, kept text such as '0-257,300', tokenizer text")

    @property
    def ids(self) -> tuple[int, ...]:
        """The kept ids. Raises RecipeError where `kept` says none."""
        found = from_ranges(self.kept)
        if not found:
            raise RecipeError("the plan keeps no token")
        return found
