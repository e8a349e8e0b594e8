"""WordPiece: the longest piece that fits, from the left; a word that cannot be finished is unknown."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from hf_shrink.surgery.tokenizer.pieces import refuse_unspellable


@dataclass(frozen=True)
class WordPieces:
    """A WordPiece model.

    The longest of all that fit is the longest of fewer: words whose pieces stay are cut as before. Where every piece
    can be spelled in single characters, a word is unknown exactly where one of its characters is.

    Attributes:
        prefix: mark of pieces that go on with a word.
    """

    ids: Mapping[str, int]
    prefix: str
    unknown: str

    @classmethod
    def read(cls, model: Mapping[str, Any]) -> WordPieces:
        return cls(model["vocab"], model["continuing_subword_prefix"], model["unk_token"])

    def basic(self, added: Collection[str]) -> set[str]:
        words = self.ids.keys() - set(added) - {self.unknown}
        refuse_unspellable([piece for piece in words if not set(self._characters(piece)) <= self.ids.keys()])
        return {piece for piece in words if len(self._characters(piece)) == 1} | ({self.unknown} & self.ids.keys())

    def needs(self, piece: str) -> set[str]:
        return set()

    def spell(self, piece: str) -> list[str]:
        characters, found = self._characters(piece), []
        while characters:
            end = len(characters)
            while end > 1 and self._join(characters[:end]) not in self.ids:
                end -= 1
            found.append(self._join(characters[:end]))
            characters = characters[end:]
        return found

    def without(self, model: Mapping[str, Any], new_ids: Mapping[str, int]) -> dict[str, Any]:
        return {**model, "vocab": dict(new_ids)}

    def _characters(self, piece: str) -> list[str]:
        goes_on = piece.startswith(self.prefix) and len(piece) > len(self.prefix)
        body = piece.removeprefix(self.prefix) if goes_on else piece
        return [(self.prefix if goes_on or at else "") + character for at, character in enumerate(body)]

    def _join(self, characters: list[str]) -> str:
        return characters[0] + "".join(character.removeprefix(self.prefix) for character in characters[1:])
