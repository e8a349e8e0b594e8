"""Texts that a model writes for texts: summaries, translations, answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from hf_shrink.calibration.targets import kind_of
from hf_shrink.calibration.text import encode
from hf_shrink.errors import CalibrationError
from hf_shrink.evaluation.answers import same_answer
from hf_shrink.evaluation.greedy import greedy_config
from hf_shrink.evaluation.observed import Columns, same
from hf_shrink.evaluation.tasks.base import TASKS, Progressing, Row, Subject, Task
from hf_shrink.evaluation.tasks.cells import text_of, texts_of


@TASKS.register("generation")
@dataclass(frozen=True)
class Generation(Task):
    """The greedy continuation of a text.

    Attributes:
        template: what the model reads, with {text}.
        new: tokens that it may write.
        until: what it writes is cut there; empty: nowhere.
    """

    template: str = "{text}"
    new: int = 64
    until: str = ""

    roles: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "text": ("text", "document", "article", "dialogue", "source", "question", "input", "prompt"),
        "target": ("target", "summary", "highlights", "translation", "answers", "answer", "output", "completion"),
        "group": ("group",),
    }
    optional: ClassVar[tuple[str, ...]] = ("group",)
    lists: ClassVar[tuple[str, ...]] = ("target",)

    def suits(self, model: Any) -> bool:
        reads = getattr(model, "main_input_name", "")
        return kind_of(model) == "seq2seq" and reads == "input_ids"

    def check(self, subject: Subject) -> None:
        writes = getattr(subject.model, "can_generate", lambda: False)()
        if not writes or getattr(subject.model, "main_input_name", "") != "input_ids":
            raise CalibrationError(f"{type(subject.model).__name__} does not write texts for texts; use another recipe")

    def references(self, subject: Subject, rows: Sequence[Row]) -> Columns:
        return {"reference_texts": [texts_of(row, "target") for row in rows], "compared": [1] * len(rows)}

    def answers(self, subject: Subject, rows: Sequence[Row], run: Progressing) -> Columns:
        model, tokenizer = subject.model, subject.tokenizer
        decoder_only = not model.config.is_encoder_decoder
        config = greedy_config(model, self.new, pad_token_id=tokenizer.pad_token_id)
        texts: list[str] = []
        room = max(subject.tokens - (self.new if decoder_only else 0), 1)
        for batch in run.batches(rows, subject.alone):
            encoded = tokenizer(
                [self._prompt(tokenizer, text_of(row, "text"), room) for row in batch],
                padding=not subject.alone,
                truncation=True,
                max_length=room,
                padding_side="left" if decoder_only else None,
                return_tensors="pt",
            )
            inputs = subject.inputs(encoded)
            inputs.pop("token_type_ids", None)  # made by some tokenizers, refused by decoders
            ids = model.generate(**inputs, generation_config=config)
            start = inputs["input_ids"].shape[1] if decoder_only else 0
            texts += [self._cut(text) for text in tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)]
        right = self.references(subject, rows)["reference_texts"]
        correct = [float(same_answer(text, wanted)) for text, wanted in zip(texts, right, strict=True)]
        return {"text": texts, "correct": correct}

    def between(self, own: Columns, dense: Columns) -> Columns:
        return {"agreeing": same(own["text"], dense["text"])}

    def _prompt(self, tokenizer: PreTrainedTokenizerBase, text: str, room: int) -> str:
        """The template with the text, of which so much is kept that what stands around it fits as well."""
        if "{text}" not in self.template:
            raise CalibrationError(f"the template {self.template!r} has no {{text}}")

        def made(text: str) -> tuple[str, int]:
            prompt = self.template.replace("{text}", text)
            return prompt, len(tokenizer(prompt, verbose=False)["input_ids"])

        prompt, length = made(text)
        if self.template == "{text}" or length <= room:  # a text alone is cut by the tokenizer
            return prompt
        left = (room - made("")[1]) // self.template.count("{text}")
        ids = encode([text], tokenizer)[0]
        while left > 0:
            prompt, length = made(str(tokenizer.decode(ids[:left], clean_up_tokenization_spaces=False)))
            if length <= room:
                return prompt
            left -= length - room
        raise CalibrationError(
            f"the template {self.template!r} leaves no room for a text within {room} tokens; give a longer length"
        )

    def _cut(self, text: str) -> str:
        return (text.partition(self.until)[0] if self.until else text).strip()
