"""Byte-pair encoding: a piece is found only by merging the pieces that it is made of."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from hf_shrink.errors import RecipeError
from hf_shrink.surgery.tokenizer.pieces import BYTE, PLAIN, has_all_bytes, refuse_unspellable

Merge = tuple[str, str]


@dataclass(frozen=True)
class BytePairs:
    """A BPE model, over the characters that stand for bytes or over those of the text.

    Which merges happen inside a span that ends up as one piece depends on that span alone, so the pieces that its own
    text is merged from (`needs`) are all that must stay with it. And a merge that is the first of all is the first of
    fewer: texts whose pieces stay are cut as before.

    Attributes:
        ranks: of every merge; the lowest one goes first, the leftmost of equals.
        prefix, suffix: marks of pieces inside a word and at its end; empty in most tokenizers.
        spells_bytes: characters without a piece are spelled in the pieces of their UTF-8 bytes, and decoded from them.
        whole_words: words that are a piece are found without merging.
    """

    ids: Mapping[str, int]
    ranks: Mapping[Merge, int]
    prefix: str = ""
    suffix: str = ""
    unknown: str | None = None
    spells_bytes: bool = False
    whole_words: bool = False

    @classmethod
    def read(cls, model: Mapping[str, Any], *, decodes_bytes: bool) -> BytePairs:
        """Raises RecipeError where merges are left out at random."""
        if model.get("dropout"):
            raise RecipeError("this tokenizer leaves out merges at random (dropout), so its pieces cannot be kept")
        return cls(
            ids=model["vocab"],
            ranks={merge: rank for rank, merge in enumerate(_merges(model))},
            prefix=model.get("continuing_subword_prefix") or "",
            suffix=model.get("end_of_word_suffix") or "",
            unknown=model.get("unk_token"),
            spells_bytes=bool(model.get("byte_fallback")) and decodes_bytes and has_all_bytes(model["vocab"]),
            whole_words=bool(model.get("ignore_merges")),
        )

    def basic(self, added: Collection[str]) -> set[str]:
        single = {piece for piece in self.ids if len(self._body(piece)) == 1}
        if self.whole_words and not self.spells_bytes:
            words = self.ids.keys() - set(added) - {self.unknown}
            refuse_unspellable([piece for piece in words if not set(self._characters(piece)) <= self.ids.keys()])
        if self.spells_bytes:
            single = {piece for piece in single if self._body(piece) in PLAIN}
        return (
            single | {p for p in self.ids if BYTE.fullmatch(p)} | {piece for piece in self.ids if piece == self.unknown}
        )

    def needs(self, piece: str) -> set[str]:
        made: set[str] = set(self._characters(piece))
        if self._merged(self._characters(piece), made) != [piece]:
            return set()  # not made by merges: it is added, or found whole (ignore_merges)
        return (made & self.ids.keys()) - {piece}

    def spell(self, piece: str) -> list[str]:
        characters: list[str] = []
        for character in self._characters(piece):
            known = character in self.ids or not self.spells_bytes
            characters += [character] if known else [f"<0x{byte:02X}>" for byte in character.encode()]
        return self._merged(characters, set())

    def without(self, model: Mapping[str, Any], new_ids: Mapping[str, int]) -> dict[str, Any]:
        merges = [
            [left, right]
            for left, right in _merges(model)
            if left in new_ids and right in new_ids and self._joined(left, right) in new_ids
        ]
        return {**model, "vocab": dict(new_ids), "merges": merges}

    def _merged(self, symbols: list[str], made: set[str]) -> list[str]:
        """The symbols after all merges; `made` gets everything that is made on the way."""
        last = len(self.ranks)
        while len(symbols) > 1:
            ranks = [self.ranks.get(pair, last) for pair in itertools.pairwise(symbols)]
            best = min(ranks)
            if best == last:
                break
            at = ranks.index(best)
            symbols = [*symbols[:at], self._joined(symbols[at], symbols[at + 1]), *symbols[at + 2 :]]
            made.add(symbols[at])
        return symbols

    def _joined(self, left: str, right: str) -> str:
        return left + right.removeprefix(self.prefix)

    def _body(self, piece: str) -> str:
        return piece.removeprefix(self.prefix).removesuffix(self.suffix) or piece

    def _characters(self, piece: str) -> list[str]:
        body = self._body(piece)
        inside, ends = bool(self.prefix) and piece.startswith(self.prefix), piece.endswith(self.suffix)
        marked = [(self.prefix if inside or at else "") + character for at, character in enumerate(body)]
        return [*marked[:-1], marked[-1] + (self.suffix if ends else "")] if marked else []


def _merges(model: Mapping[str, Any]) -> list[Merge]:
    """Older files have "a b" where newer ones have ["a", "b"]."""
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    return [(left, right) for left, right in pairs]
