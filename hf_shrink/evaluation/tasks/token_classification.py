"""Tags of words: names of people and places, parts of speech."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES

from hf_shrink.errors import CalibrationError
from hf_shrink.evaluation.observed import Columns, same
from hf_shrink.evaluation.scored import finite
from hf_shrink.evaluation.tasks.base import TASKS, Progressing, Row, Subject, Task
from hf_shrink.evaluation.tasks.cells import listed, texts_of
from hf_shrink.evaluation.tasks.classification import is_of


@TASKS.register("token-classification")
@dataclass(frozen=True)
class TokenClassification(Task):
    """A tag for each word; a word's is that of its first token, and words beyond the model's length get "O"."""

    roles: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "tokens": ("tokens", "words"),
        "tags": ("tags", "ner_tags", "pos_tags", "labels"),
        "group": ("group",),
    }
    optional: ClassVar[tuple[str, ...]] = ("group",)

    def suits(self, model: Any) -> bool:
        return is_of(model, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES)

    def references(self, subject: Subject, rows: Sequence[Row]) -> Columns:
        names = subject.model.config.id2label
        tags = [
            [tag if isinstance(tag, str) else _name(names, tag) for tag in listed(row["tags"], "tags")] for row in rows
        ]
        return {"reference_tags": tags, "compared": [len(row) for row in tags]}

    def answers(self, subject: Subject, rows: Sequence[Row], run: Progressing) -> Columns:
        tokenizer = subject.tokenizer
        if not tokenizer.is_fast:
            raise CalibrationError(f"{type(tokenizer).__name__} does not say which word a token is of; use a fast one")
        names, tags = subject.model.config.id2label, []
        for batch in run.batches(rows, subject.alone):
            given = [texts_of({**row, "tokens": listed(row["tokens"], "tokens")}, "tokens") for row in batch]
            encoded = tokenizer(
                given,
                is_split_into_words=True,
                padding=not subject.alone,
                truncation=True,
                max_length=subject.tokens,
                return_tensors="pt",
            )
            logits: Tensor = subject.model(**subject.inputs(encoded)).logits
            finite(logits[encoded["attention_mask"].bool().to(logits.device)])
            best = logits.argmax(-1)
            for place, words_given in enumerate(given):
                found = ["O"] * len(words_given)
                words = encoded.word_ids(place)
                for word, before, choice in zip(words, [None, *words], best[place].tolist(), strict=False):
                    if word is not None and word != before:
                        found[word] = names[choice]
                tags.append(found)
        right = self.references(subject, rows)["reference_tags"]
        return {"tags": tags, "correct": same(tags, right)}

    def between(self, own: Columns, dense: Columns) -> Columns:
        return {"agreeing": [sum(same(*both)) for both in zip(own["tags"], dense["tags"], strict=True)]}


def _name(names: Mapping[int, str], tag: int) -> str:
    if tag not in names:
        raise CalibrationError(f"the data has the tag {tag}, but the model has {len(names)}")
    return names[tag]
