"""F1 of the words that a text shares with a reference."""

from __future__ import annotations

from collections import Counter

from hf_shrink.evaluation import modules
from hf_shrink.evaluation.answers import plain_words


class AnswerF1(modules.Texts):
    """Mean over texts of the F1 of words shared with the best reference (SQuAD's): 1 for the same words."""

    reads = ("text", "reference_texts")
    paper = "arXiv:1606.05250"

    def score(self, text: str, reference: str) -> float:
        words, wanted = plain_words(text), plain_words(reference)
        if not words or not wanted:
            return float(words == wanted)
        return 2 * (Counter(words) & Counter(wanted)).total() / (len(words) + len(wanted))
