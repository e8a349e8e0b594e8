"""Unigram: of all ways to cut a text the likeliest."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import models

from hf_shrink.errors import RecipeError
from hf_shrink.surgery.tokenizer.pieces import BYTE, PLAIN, has_all_bytes, refuse_unspellable


@dataclass(frozen=True)
class Unigrams:
    """A Unigram model (SentencePiece's default).

    The likeliest of all ways is the likeliest of fewer, with the same scores: texts whose pieces stay are cut as
    before. What is unknown scores 10 below the worst piece, so that one stays.

    Attributes:
        scores: of every piece, by id.
        spells_bytes: as in `BytePairs`.
    """

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    unknown: int | None
    spells_bytes: bool

    @classmethod
    def read(cls, model: Mapping[str, Any], *, decodes_bytes: bool) -> Unigrams:
        """Raises RecipeError where a piece is in the vocabulary twice."""
        pieces = tuple(piece for piece, _ in model["vocab"])
        spells_bytes = bool(model.get("byte_fallback")) and decodes_bytes and has_all_bytes(dict.fromkeys(pieces, 0))
        if len(set(pieces)) < len(pieces):
            raise RecipeError("this tokenizer has a piece twice; its vocabulary stays whole")
        return cls(pieces, tuple(score for _, score in model["vocab"]), model.get("unk_id"), spells_bytes)

    @cached_property
    def ids(self) -> dict[str, int]:
        return {piece: index for index, piece in enumerate(self.pieces)}

    def basic(self, added: Collection[str]) -> set[str]:
        always = {p for p in self.pieces if BYTE.fullmatch(p)} | {self.pieces[self.scores.index(min(self.scores))]}
        always |= {self.pieces[self.unknown]} if self.unknown is not None else set()
        words = self.ids.keys() - set(added) - always
        single = {piece for piece in words if len(piece) == 1}
        if self.spells_bytes:
            return always | (single & PLAIN)
        refuse_unspellable([piece for piece in words if not set(piece) <= self.ids.keys()])
        return always | single

    def needs(self, piece: str) -> set[str]:
        return set()

    def spell(self, piece: str) -> list[str]:
        return [token.value for token in self._model.tokenize(piece)]

    @cached_property
    def _model(self) -> models.Unigram:
        vocabulary = list(zip(self.pieces, self.scores, strict=True))
        return models.Unigram(vocabulary, self.unknown, self.spells_bytes)

    def without(self, model: Mapping[str, Any], new_ids: Mapping[str, int]) -> dict[str, Any]:
        kept = sorted(new_ids, key=lambda piece: new_ids[piece])
        unknown = None if self.unknown is None else new_ids[self.pieces[self.unknown]]
        vocabulary = [[piece, self.scores[self.ids[piece]]] for piece in kept]
        return {**model, "vocab": vocabulary, "unk_id": unknown}
