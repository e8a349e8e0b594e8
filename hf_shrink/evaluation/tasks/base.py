"""What a task is: it reads rows, asks one model, and hands back columns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_shrink.architectures.reads import accepted_names
from hf_shrink.calibration.inputs import MediaProcessor, longest_text, media_processor_of, tokenizer_of
from hf_shrink.errors import CalibrationError
from hf_shrink.evaluation.observed import Columns
from hf_shrink.evaluation.scored import device_of
from hf_shrink.registry import Registry

Row: TypeAlias = Mapping[str, Any]
"""A row by role ("text", "label", ...), whatever its columns are called."""


@dataclass(frozen=True)
class Subject:
    """A model to ask.

    Attributes:
        model: in eval mode.
        processing: its tokenizer or processor.
        length: tokens of an input at most; longer ones are cut.
    """

    model: Any
    processing: Any
    length: int

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises CalibrationError where there is none."""
        found = tokenizer_of(self.processing)
        if found is None:
            raise CalibrationError(f"{type(self.model).__name__} reads text; pass its tokenizer as tokenizer=")
        return found

    @property
    def media(self) -> MediaProcessor:
        """Image processor or feature extractor. Raises CalibrationError where there is none."""
        found = media_processor_of(self.processing)
        if found is None:
            reads = getattr(self.model, "main_input_name", "images or sounds")
            raise CalibrationError(f"{type(self.model).__name__} reads {reads}; pass its processor as tokenizer=")
        return found

    @property
    def tokens(self) -> int:
        """Tokens of an input at most, as the model has positions."""
        limit = longest_text(self.model)
        return self.length if limit is None else min(self.length, limit)

    def inputs(self, made: Mapping[str, Any]) -> dict[str, Tensor]:
        """What the model takes of what a processor made, on its device and in its dtype."""
        accepted = accepted_names(self.model)
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
        device = device_of(self.model)
        return {
            name: value.to(device, dtype if value.is_floating_point() else None)
            for name, value in made.items()
            if isinstance(value, Tensor) and (accepted is None or name in accepted)
        }

    @property
    def alone(self) -> bool:
        """Whether texts do not fit one batch: the tokenizer has no token that makes them equally long."""
        return self.tokenizer.pad_token_id is None

    def padded(self, texts: Sequence[str], others: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Texts, or pairs of them, as one batch; a single one where `alone`."""
        made = self.tokenizer(
            list(texts),
            None if others is None else list(others),
            padding=not self.alone,
            truncation=True,
            max_length=self.tokens,
            return_tensors="pt",
        )
        return self.inputs(made)


class Progressing:
    """Cuts rows into batches, and says how far it is."""

    def __init__(self, size: int, tick: Any, total: int) -> None:
        self._size, self._tick, self._total, self._done = size, tick, total, 0

    def batches(self, rows: Sequence[Any], alone: bool = False) -> Iterator[Sequence[Any]]:
        """`alone`: one row at a time."""
        size = 1 if alone else self._size
        for start in range(0, len(rows), size):
            yield rows[start : start + size]
            self._done += len(rows[start : start + size])
            self._tick("evaluate", min(self._done, self._total), self._total)


class Task(ABC):
    """A kind of task; subclasses are frozen dataclasses whose fields are the options of a recipe.

    Attributes:
        roles: what a row has, and the column names that usually hold it, best first.
        optional: roles that rows may lack.
        lists: roles that may be a list or a text, so that a CSV file has a list as JSON.
        together: columns that belong together, by role, best first: where there are all of one they are taken.
    """

    roles: ClassVar[Mapping[str, tuple[str, ...]]]
    optional: ClassVar[tuple[str, ...]] = ()
    lists: ClassVar[tuple[str, ...]] = ()
    together: ClassVar[tuple[Mapping[str, str], ...]] = ()

    @abstractmethod
    def suits(self, model: Any) -> bool:
        """Whether the model was made for this task, so that rows with its columns mean it."""

    def needs(self, model: Any) -> list[str]:
        """The roles that every row must have something in for this model."""
        return [role for role in self.roles if role not in self.optional]

    def check(self, subject: Subject) -> None:
        """Raises CalibrationError where the model cannot do this task at all."""
        if not self.suits(subject.model):
            raise CalibrationError(
                f"{type(subject.model).__name__} has no head for this task ({type(self).__name__}); use another recipe"
            )

    @abstractmethod
    def references(self, subject: Subject, rows: Sequence[Row]) -> Columns:
        """Columns of the data: right answers and counts. Raises CalibrationError for rows that have none."""

    @abstractmethod
    def answers(self, subject: Subject, rows: Sequence[Row], run: Progressing) -> Columns:
        """What the model makes of the rows, a few numbers or a text each."""

    def between(self, own: Columns, dense: Columns) -> Columns:
        """What the answers of both models together say."""
        return {}

    def batches(self, subject: Subject, rows: Sequence[Row]) -> Iterator[dict[str, Tensor]]:
        """Model inputs, a row each, for what looks into the model; none where an answer takes several of them.

        Each is made when it is its turn.
        """
        return iter(())


TASKS: Registry[Task] = Registry("evaluation task", "hf_shrink.evaluation.tasks")
