"""Seen: tokens that the texts do not use have rows in embedding and head that nothing reads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_shrink.errors import RecipeError
from hf_shrink.pruning.base import VOCABULARY


@VOCABULARY.register("seen")
@dataclass(frozen=True)
class Seen:
    """Keep the tokens that occur in given texts (Abdaoui et al., arXiv 2010.05609, for languages of a multilingual
    model).

    Attributes:
        texts: paths of .txt, .jsonl and .parquet files, or names of data recipes; default: the calibration data.
        min_count: how often a token must occur.
        tokens: most tokens that are read of each text; None: all.
        multiple_of: see `VocabularyMethod`; kernels like 64.
    """

    texts: tuple[str, ...] = ()
    min_count: int = 1
    tokens: int | None = 2_000_000
    multiple_of: int = 64

    def __post_init__(self) -> None:
        if isinstance(self.texts, str) or not all(isinstance(text, str) for text in self.texts):
            raise RecipeError("texts is a list of files or names of data, for example [notes.txt, wikitext]")
        object.__setattr__(self, "texts", tuple(self.texts))
        for name, value in (("min_count", self.min_count), ("multiple_of", self.multiple_of), ("tokens", self.tokens)):
            if name == "tokens" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RecipeError(f"{name} must be a whole number of at least 1, not {value!r}")

    def keeps(self, counts: Tensor) -> Tensor:
        return counts >= self.min_count
