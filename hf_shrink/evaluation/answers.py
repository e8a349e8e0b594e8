"""When two answers are the same: SQuAD's rules (arXiv:1606.05250)."""

from __future__ import annotations

import re
import string

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def plain_words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation and English articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def same_answer(text: str, references: list[str]) -> bool:
    """Whether the text is one of the references, but for case, punctuation and articles."""
    words = plain_words(text)
    return any(words == plain_words(reference) for reference in references or [""])
