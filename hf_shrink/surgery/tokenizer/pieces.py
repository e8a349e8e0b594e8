"""What the kinds of tokenizer models have in common."""

from __future__ import annotations

import re
import string
from collections.abc import Collection, Mapping
from typing import Any, Protocol

from hf_shrink.errors import RecipeError

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# Characters that stay even where bytes could stand for them: decoders turn some of these into spaces.
PLAIN = frozenset(string.printable) | {"\u2581"}


class Pieces(Protocol):
    """The vocabulary of a tokenizer's model."""

    @property
    def ids(self) -> Mapping[str, int]:
        """By piece."""
        ...

    def basic(self, added: Collection[str]) -> set[str]:
        """Pieces that must stay so that every text can be spelled as well as before, and is unknown only where it was.

        Args:
            added: tokens that are found before the model sees a text.

        Raises:
            RecipeError: with no such set can it be proved.
        """
        ...

    def needs(self, piece: str) -> set[str]:
        """Pieces that must stay beside `piece` so that it is still found wherever it was."""
        ...

    def spell(self, piece: str) -> list[str]:
        """The pieces that this vocabulary has for a text that was one piece of a larger one."""
        ...

    def without(self, model: Mapping[str, Any], new_ids: Mapping[str, int]) -> dict[str, Any]:
        """The `model` part of the JSON with only the pieces of `new_ids`, numbered so, from the part as it was."""
        ...


def refuse_unspellable(pieces: Collection[str]) -> None:
    """Raises RecipeError where pieces hold characters that the vocabulary has not as pieces of their own.

    Without them it holds that a text is unknown exactly where a character is, whatever else is in the vocabulary.
    """
    if pieces:
        raise RecipeError(
            f"{len(pieces)} pieces of this tokenizer, such as {min(pieces)!r}, hold characters that are no pieces of "
            "their own, so that other texts could come out different once pieces are gone; its vocabulary stays whole"
        )


def has_all_bytes(ids: Mapping[str, int]) -> bool:
    """Whether there is a piece <0x00> to <0xFF> for every byte."""
    return all(f"<0x{byte:02X}>" in ids for byte in range(256))
