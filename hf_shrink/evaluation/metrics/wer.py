"""Word error rate of transcriptions."""

from __future__ import annotations

from typing import Any

import datasets
import jiwer

from hf_shrink.evaluation import modules
from hf_shrink.evaluation.bootstrap import Interval, ratio_interval

_STEPS: tuple[Any, ...] = (jiwer.ToLowerCase, jiwer.RemovePunctuation, jiwer.RemoveMultipleSpaces, jiwer.Strip)
_WORDS = jiwer.Compose([step() for step in _STEPS])


class WER(modules.Module):
    """Words substituted, left out or put in, over the words said: 0 for a perfect transcript, can exceed 1.

    Case and punctuation do not count.
    """

    reads = ("text", "transcript")
    inputs = ("transcripts", "what was said")
    better = "lower"

    @classmethod
    def columns(cls) -> list[dict[str, Any]]:
        return [{"predictions": datasets.Value("string"), "references": datasets.Value("string")}]

    def interval(self, predictions: list[str], references: list[str], seed: int) -> Interval:
        counted = [_errors(_WORDS(text), _WORDS(said)) for text, said in zip(predictions, references, strict=True)]
        # A clip in which nothing was said stands with one word, so that what is put in there counts.
        return ratio_interval([float(wrong) for wrong, _ in counted], [max(words, 1) for _, words in counted], seed)


def _errors(text: str, said: str) -> tuple[int, int]:
    """Wrong words, and words said."""
    if not said:
        return len(text.split()), 0
    found = jiwer.process_words(said, text)
    wrong = found.substitutions + found.deletions + found.insertions
    return wrong, found.substitutions + found.deletions + found.hits
