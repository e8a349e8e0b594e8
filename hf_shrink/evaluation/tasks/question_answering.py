"""Answers that are a stretch of a given text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES

from hf_shrink.errors import CalibrationError
from hf_shrink.evaluation.answers import same_answer
from hf_shrink.evaluation.observed import Columns, same
from hf_shrink.evaluation.scored import finite
from hf_shrink.evaluation.tasks.base import TASKS, Progressing, Row, Subject, Task
from hf_shrink.evaluation.tasks.cells import text_of, texts_of
from hf_shrink.evaluation.tasks.classification import is_of


@TASKS.register("question-answering")
@dataclass(frozen=True)
class QuestionAnswering(Task):
    """The most likely stretch of the context, which is read in windows that overlap by `stride` tokens.

    Attributes:
        stride: tokens that two windows of a long context share.
        longest: tokens of an answer at most.
    """

    stride: int = 128
    longest: int = 30

    roles: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "question": ("question",),
        "context": ("context", "passage"),
        "answers": ("answers", "answer"),
        "group": ("group",),
    }
    optional: ClassVar[tuple[str, ...]] = ("group",)
    lists: ClassVar[tuple[str, ...]] = ("answers",)

    def suits(self, model: Any) -> bool:
        return is_of(model, MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES)

    def references(self, subject: Subject, rows: Sequence[Row]) -> Columns:
        return {"reference_texts": [texts_of(row, "answers") for row in rows], "compared": [1] * len(rows)}

    def answers(self, subject: Subject, rows: Sequence[Row], run: Progressing) -> Columns:
        if not subject.tokenizer.is_fast:
            raise CalibrationError(
                f"{type(subject.tokenizer).__name__} does not say where a token stands; use a fast one"
            )
        texts = [self._answer(subject, row) for batch in run.batches(rows) for row in batch]
        right = self.references(subject, rows)["reference_texts"]
        correct = [float(same_answer(text, wanted)) for text, wanted in zip(texts, right, strict=True)]
        return {"text": texts, "correct": correct}

    def between(self, own: Columns, dense: Columns) -> Columns:
        return {"agreeing": same(own["text"], dense["text"])}

    def _answer(self, subject: Subject, row: Row) -> str:
        question, context = text_of(row, "question"), text_of(row, "context")
        room = subject.tokens - len(subject.tokenizer(question)["input_ids"]) - 2
        if room < 1:
            raise CalibrationError(
                f"the question {question[:60]!r} leaves no room for its context; give a longer length"
            )
        encoded = subject.tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=subject.tokens,
            stride=min(self.stride, room // 2),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        best, answer = -float("inf"), ""
        for window, offsets in enumerate(encoded["offset_mapping"]):
            made = {name: torch.tensor([values[window]]) for name, values in encoded.items()}
            outputs = subject.model(**subject.inputs(made))
            inside = torch.tensor([part == 1 for part in encoded.sequence_ids(window)])
            starts, ends = (logits[0].float().cpu() for logits in (outputs.start_logits, outputs.end_logits))
            finite(torch.stack([starts, ends])[:, inside])
            score, start, end = self._best(starts, ends, inside)
            if score > best:
                best, answer = score, context[offsets[start][0] : offsets[end][1]]
        return answer

    def _best(self, starts: Tensor, ends: Tensor, inside: Tensor) -> tuple[float, int, int]:
        """The best stretch inside the context: score, first and last token."""
        pairs = starts[:, None] + ends[None]
        allowed = inside[:, None] & inside[None]
        allowed &= torch.ones_like(allowed).triu() & ~torch.ones_like(allowed).triu(self.longest)
        place = int(pairs.masked_fill(~allowed, -float("inf")).argmax())
        start, end = divmod(place, len(ends))
        return float(pairs[start, end]) if bool(allowed[start, end]) else -float("inf"), start, end
