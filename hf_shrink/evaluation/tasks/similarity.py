"""How alike two texts are, by the cosine of their embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from hf_shrink.evaluation.embeddings import Pooling, check_pooling, cosines, embeddings, embeds_texts
from hf_shrink.evaluation.observed import Columns
from hf_shrink.evaluation.tasks.base import TASKS, Progressing, Row, Subject, Task
from hf_shrink.evaluation.tasks.cells import number_of, text_of


@TASKS.register("similarity")
@dataclass(frozen=True)
class Similarity(Task):
    """The cosine of two texts' embeddings, to be ranked as people's scores are (STS).

    Attributes:
        pooling: "mean", "first" or "last".
    """

    pooling: Pooling = "mean"

    roles: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "first": ("sentence1", "text1", "first", "premise"),
        "second": ("sentence2", "text2", "second", "hypothesis"),
        "score": ("score", "label", "similarity", "similarity_score"),
        "group": ("group", "genre"),
    }
    optional: ClassVar[tuple[str, ...]] = ("group",)

    def __post_init__(self) -> None:
        check_pooling(self.pooling)

    def suits(self, model: Any) -> bool:
        return embeds_texts(model)

    def references(self, subject: Subject, rows: Sequence[Row]) -> Columns:
        return {"reference_score": [number_of(row, "score") for row in rows], "compared": [2] * len(rows)}

    def answers(self, subject: Subject, rows: Sequence[Row], run: Progressing) -> Columns:
        texts = [text_of(row, role) for role in ("first", "second") for row in rows]
        both = embeddings(subject, texts, self.pooling, run)
        first, second = both.chunk(2)
        return {"score": (first * second).double().sum(-1).tolist(), "vectors": [*first], "other_vectors": [*second]}

    def between(self, own: Columns, dense: Columns) -> Columns:
        first = cosines(own["vectors"], dense["vectors"])
        second = cosines(own["other_vectors"], dense["other_vectors"])
        if first is None or second is None:
            return {}
        return {"cosine": [sum(both) for both in zip(first, second, strict=True)]}

    def batches(self, subject: Subject, rows: Sequence[Row]) -> Iterator[dict[str, Tensor]]:
        return (subject.padded([text_of(row, "first")]) for row in rows)
