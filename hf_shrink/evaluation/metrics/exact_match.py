"""Exact match of texts."""

from __future__ import annotations

from hf_shrink.evaluation import modules
from hf_shrink.evaluation.answers import same_answer


class ExactMatch(modules.Texts):
    """Share of texts that are one of their references, but for case, punctuation and articles (SQuAD's rules)."""

    reads = ("text", "reference_texts")
    paper = "arXiv:1606.05250"

    def score(self, text: str, reference: str) -> float:
        return float(same_answer(text, [reference]))
