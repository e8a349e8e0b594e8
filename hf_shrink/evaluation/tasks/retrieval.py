"""Which document answers a query, by the cosine of their embeddings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from hf_shrink.evaluation.embeddings import Pooling, check_pooling, cosines, embeddings, embeds_texts
from hf_shrink.evaluation.observed import Columns, same
from hf_shrink.evaluation.tasks.base import TASKS, Progressing, Row, Subject, Task
from hf_shrink.evaluation.tasks.cells import text_of

KEPT = 10


@TASKS.register("retrieval")
@dataclass(frozen=True)
class Retrieval(Task):
    """Every query looks among the documents of all rows for those that stand beside it.

    Attributes:
        pooling: "mean", "first" or "last".
        query, document: what is put before a query and a document ("query: " and "passage: " for E5).
    """

    pooling: Pooling = "mean"
    query: str = ""
    document: str = ""

    roles: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "query": ("query", "question", "anchor"),
        "document": ("document", "answer", "positive", "passage", "text"),
        "group": ("group",),
    }
    optional: ClassVar[tuple[str, ...]] = ("group",)

    def __post_init__(self) -> None:
        check_pooling(self.pooling)

    def suits(self, model: Any) -> bool:
        return embeds_texts(model)

    def references(self, subject: Subject, rows: Sequence[Row]) -> Columns:
        relevant = _relevant(rows)
        ideal = [[1.0] * len(relevant[text_of(row, "query")]) for row in rows]
        return {"ideal_gains": ideal, "compared": [1] * len(rows)}

    def answers(self, subject: Subject, rows: Sequence[Row], run: Progressing) -> Columns:
        asked, relevant = [text_of(row, "query") for row in rows], _relevant(rows)
        documents = list(dict.fromkeys(text_of(row, "document") for row in rows))
        texts = [f"{self.query}{text}" for text in asked] + [f"{self.document}{text}" for text in documents]
        vectors = embeddings(subject, texts, self.pooling, run)
        queries, found = vectors[: len(rows)], vectors[len(rows) :]
        gains, first = [], []
        for text, query in zip(asked, queries, strict=True):
            order = (found @ query).topk(min(KEPT, len(documents))).indices.tolist()
            first.append(order[0])
            gains.append([float(documents[place] in relevant[text]) for place in order])
        return {"gains": gains, "first": first, "correct": [one[0] for one in gains], "vectors": [*queries]}

    def between(self, own: Columns, dense: Columns) -> Columns:
        cosine = cosines(own["vectors"], dense["vectors"])
        found: Columns = {"agreeing": same(own["first"], dense["first"])}
        return found if cosine is None else {**found, "cosine": cosine}

    def batches(self, subject: Subject, rows: Sequence[Row]) -> Iterator[dict[str, Tensor]]:
        return (subject.padded([f"{self.query}{text_of(row, 'query')}"]) for row in rows)


def _relevant(rows: Sequence[Row]) -> Mapping[str, set[str]]:
    """The documents beside each query."""
    found: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        found[text_of(row, "query")].add(text_of(row, "document"))
    return found
