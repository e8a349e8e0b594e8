"""ROUGE-L: the longest common subsequence of words."""

from __future__ import annotations

import re

from rapidfuzz.distance import LCSseq

from hf_shrink.evaluation import modules

_WORD = re.compile(r"\w+")


class RougeL(modules.Texts):
    """Mean over texts of the F1 of the longest common subsequence of words with the best reference, words unstemmed."""

    reads = ("text", "reference_texts")
    paper = "Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004"

    def score(self, text: str, reference: str) -> float:
        words, wanted = _WORD.findall(text.lower()), _WORD.findall(reference.lower())
        if not words or not wanted:
            return float(words == wanted)
        return 2 * LCSseq.similarity(words, wanted) / (len(words) + len(wanted))
