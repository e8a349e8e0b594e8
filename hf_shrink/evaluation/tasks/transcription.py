"""What is said in sounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers.models.auto import modeling_auto as auto

from hf_shrink.evaluation.answers import same_answer
from hf_shrink.evaluation.greedy import greedy_config
from hf_shrink.evaluation.media import read_clips
from hf_shrink.evaluation.observed import Columns, same
from hf_shrink.evaluation.scored import finite
from hf_shrink.evaluation.tasks.base import TASKS, Progressing, Row, Subject, Task
from hf_shrink.evaluation.tasks.cells import text_of
from hf_shrink.evaluation.tasks.classification import is_of


@TASKS.register("transcription")
@dataclass(frozen=True)
class Transcription(Task):
    """Speech to text: greedily, by the decoder or by the likeliest symbol of each frame (CTC).

    Attributes:
        new: tokens that a decoder may write.
    """

    new: int = 128

    roles: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "audio": ("audio", "speech", "file", "path"),
        "text": ("text", "sentence", "transcription", "transcript"),
        "group": ("group", "speaker_id"),
    }
    optional: ClassVar[tuple[str, ...]] = ("group",)

    def suits(self, model: Any) -> bool:
        return _by_frame(model) or is_of(model, auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES)

    def references(self, subject: Subject, rows: Sequence[Row]) -> Columns:
        return {"transcript": [text_of(row, "text") for row in rows], "compared": [1] * len(rows)}

    def answers(self, subject: Subject, rows: Sequence[Row], run: Progressing) -> Columns:
        texts: list[str] = []
        # Sounds that are padded to one length sound otherwise to models that take no mask.
        for batch in run.batches(rows, _by_frame(subject.model)):
            inputs = subject.inputs(read_clips([row["audio"] for row in batch], subject.media))
            texts += [str(text).strip() for text in self._written(subject, inputs)]
        right = self.references(subject, rows)["transcript"]
        correct = [float(same_answer(text, [said])) for text, said in zip(texts, right, strict=True)]
        return {"text": texts, "correct": correct}

    def between(self, own: Columns, dense: Columns) -> Columns:
        return {"agreeing": same(own["text"], dense["text"])}

    def _written(self, subject: Subject, inputs: dict[str, Tensor]) -> list[str]:
        if _by_frame(subject.model):
            return list(subject.tokenizer.batch_decode(finite(subject.model(**inputs).logits).argmax(-1)))
        config = greedy_config(subject.model, self.new, pad_token_id=subject.tokenizer.pad_token_id)
        ids = subject.model.generate(**inputs, generation_config=config)
        return list(subject.tokenizer.batch_decode(ids, skip_special_tokens=True))


def _by_frame(model: Any) -> bool:
    return is_of(model, auto.MODEL_FOR_CTC_MAPPING_NAMES)
