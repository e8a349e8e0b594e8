"""Which of several continuations a language model finds most likely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hf_shrink.calibration.targets import kind_of
from hf_shrink.calibration.text import framing_of
from hf_shrink.errors import CalibrationError
from hf_shrink.evaluation.observed import Columns, same
from hf_shrink.evaluation.scored import device_of, finite
from hf_shrink.evaluation.tasks.base import TASKS, Progressing, Row, Subject, Task
from hf_shrink.evaluation.tasks.cells import listed, text_of, texts_of


@TASKS.register("multiple-choice")
@dataclass(frozen=True)
class MultipleChoice(Task):
    """The choice with the highest log-likelihood behind the question, as lm-eval scores it.

    Attributes:
        template: what stands before a choice, with {question} and, where rows have one, {context}.
        normalize: "bytes" divides a choice's log-likelihood by its length, so that short ones have no advantage.
    """

    template: str = "Question: {question}\nAnswer:"
    normalize: Literal["none", "bytes"] = "none"

    roles: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "question": ("question", "query", "ctx", "goal", "sentence"),
        "context": ("context", "passage", "support"),
        "choices": ("choices", "endings", "options"),
        "answer": ("answer", "answerKey", "label", "gold"),
        "group": ("group", "subject", "category"),
    }
    optional: ClassVar[tuple[str, ...]] = ("context", "group")

    def __post_init__(self) -> None:
        if self.normalize not in ("none", "bytes"):
            raise ValueError(f"normalize is none or bytes, not {self.normalize!r}")

    def suits(self, model: Any) -> bool:
        return kind_of(model) == "causal"

    def references(self, subject: Subject, rows: Sequence[Row]) -> Columns:
        return {"reference": [_right(row) for row in rows], "compared": [1] * len(rows)}

    def answers(self, subject: Subject, rows: Sequence[Row], run: Progressing) -> Columns:
        chosen = []
        for batch in run.batches(rows):
            for row in batch:
                choices = _choices(row)
                scores = self._likelihoods(subject, self._prompt(row), choices)
                if self.normalize == "bytes":
                    scores /= torch.tensor([max(len(choice.encode()), 1) for choice in choices])
                chosen.append(int(scores.argmax()))
        return {"prediction": chosen, "correct": same(chosen, self.references(subject, rows)["reference"])}

    def between(self, own: Columns, dense: Columns) -> Columns:
        return {"agreeing": same(own["prediction"], dense["prediction"])}

    def _prompt(self, row: Row) -> str:
        context = "" if row.get("context") is None else text_of(row, "context")
        try:
            return self.template.format(question=text_of(row, "question"), context=context).rstrip(" ")
        except (KeyError, IndexError, ValueError) as error:
            raise CalibrationError(f"the template knows {{question}} and {{context}}, and not {error}") from error

    def _likelihoods(self, subject: Subject, prompt: str, choices: Sequence[str]) -> Tensor:
        """Log-likelihood of each choice behind the prompt, float64 (choices,)."""
        tokenizer, device = subject.tokenizer, device_of(subject.model)
        prefix = list(framing_of(tokenizer, decoder_only=True).prefix)
        before = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        rows, lengths = [], []
        for choice in choices:
            ids = tokenizer(f"{prompt} {choice}", add_special_tokens=False)["input_ids"]
            lengths.append(len(ids) - before)
            rows.append([*prefix, *ids][-subject.tokens :])
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
        logits = subject.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        totals = []
        for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            stop = len(row)
            scored = slice(max(stop - length, 1), stop)  # the first token of all has nothing before it
            found = logits[place, scored.start - 1 : stop - 1].float().log_softmax(-1)
            totals.append(found.gather(-1, ids[place, scored, None]).double().sum())
        return finite(torch.stack(totals)).cpu()


def _choices(row: Row) -> list[str]:
    found = texts_of({**row, "choices": listed(row["choices"], "choices")}, "choices")
    if len(found) < 2:
        raise CalibrationError(f"the question {str(row['question'])[:60]!r} has fewer than two choices")
    return found


def _right(row: Row) -> int:
    """The number of the right choice, from its number, its letter, its label or its text."""
    answer, choices, given = row["answer"], _choices(row), listed(row["choices"], "choices")
    labels = [str(one) for one in given.get("label", ())] if isinstance(given, Mapping) else []
    letters = [chr(ord("A") + place) for place in range(len(choices))]
    for names in (labels, choices, letters):
        if isinstance(answer, str) and answer in names:
            return names.index(answer)
    number = int(answer) if isinstance(answer, int) or str(answer).isdigit() else -1
    if not 0 <= number < len(choices):
        raise CalibrationError(
            f"the answer {answer!r} to {str(row['question'])[:60]!r} is none of its {len(choices)} choices; give its "
            "number from 0, its letter or its text"
        )
    return number
