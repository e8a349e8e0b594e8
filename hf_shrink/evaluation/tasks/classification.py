"""Classes or a score of texts, pairs of texts, images or sounds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.auto import modeling_auto as auto

from hf_shrink.calibration.inputs import MEDIA
from hf_shrink.calibration.media import image_mode
from hf_shrink.errors import CalibrationError
from hf_shrink.evaluation.media import read_clips, read_images
from hf_shrink.evaluation.observed import Columns, same
from hf_shrink.evaluation.scored import finite
from hf_shrink.evaluation.tasks.base import TASKS, Progressing, Row, Subject, Task
from hf_shrink.evaluation.tasks.cells import Place, number_of, text_of

_HEADS = (
    auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
)


# What common data sets call the two texts of a pair; QNLI has question and sentence, BoolQ question and passage.
_PAIRS = (
    ("text", "pair"),
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
)


@TASKS.register("classification")
@dataclass(frozen=True)
class Classification(Task):
    """One class of several for each row; a head with one output gives a score instead (as for STS-B)."""

    roles: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "text": ("text", "sentence", "sentence1", "premise", "question", "question1"),
        "pair": ("pair", "text_pair", "sentence2", "hypothesis", "question2", "passage"),
        "image": ("image", "img", "images", "image_path"),
        "audio": ("audio", "speech", "file", "path"),
        "label": ("label", "labels", "target", "fine_label", "score"),
        "group": ("group",),
    }
    optional: ClassVar[tuple[str, ...]] = ("text", "pair", "image", "audio", "group")
    together: ClassVar[tuple[Mapping[str, str], ...]] = tuple({"text": text, "pair": pair} for text, pair in _PAIRS)

    def suits(self, model: Any) -> bool:
        return any(is_of(model, names) for names in _HEADS)

    def needs(self, model: Any) -> list[str]:
        return [*super().needs(model), _reads(model)]

    def references(self, subject: Subject, rows: Sequence[Row]) -> Columns:
        if self._scores(subject):
            return {"reference_score": [number_of(row, "label") for row in rows]}
        return {"reference": [class_of(row["label"], subject.model) for row in rows], "compared": [1] * len(rows)}

    def answers(self, subject: Subject, rows: Sequence[Row], run: Progressing) -> Columns:
        found = []
        for batch in run.batches(rows, self._alone(subject)):
            for group in _of_one_kind(batch):
                found.append(subject.model(**self._inputs(subject, group)).logits.float().cpu())
        logits = finite(torch.cat(found))
        if self._scores(subject):
            return {"score": logits[:, 0].tolist()}
        choices = logits.argmax(-1).tolist()
        right = self.references(subject, rows)["reference"]
        return {"prediction": choices, "correct": same(choices, right), "log_probabilities": [*logits.log_softmax(-1)]}

    def between(self, own: Columns, dense: Columns) -> Columns:
        return between_classes(own, dense)

    def batches(self, subject: Subject, rows: Sequence[Row]) -> Iterator[dict[str, Tensor]]:
        return (self._inputs(subject, [row]) for row in rows)

    def _alone(self, subject: Subject) -> bool:
        """Whether rows do not fit one batch."""
        main = getattr(subject.model, "main_input_name", "input_ids")
        if main == "input_ids":
            # Heads on decoders find a text's last token by the config's padding token.
            known = getattr(subject.model.config.get_text_config(), "pad_token_id", None)
            return subject.alone or subject.tokenizer.pad_token_id != known
        # Sounds that are padded to one length sound otherwise to models that take no mask.
        return main != "pixel_values"

    def _scores(self, subject: Subject) -> bool:
        return int(subject.model.config.num_labels) == 1

    def _inputs(self, subject: Subject, rows: Sequence[Row]) -> dict[str, Tensor]:
        reads = _reads(subject.model)
        if reads == "text":
            pairs = [text_of(row, "pair") for row in rows if row.get("pair") is not None]
            return subject.padded([text_of(row, "text") for row in rows], pairs or None)
        values = [row[reads] for row in rows]
        if reads == "image":
            return subject.inputs(read_images(values, subject.media, image_mode(subject.model.config)))
        return subject.inputs(read_clips(values, subject.media))


def is_of(model: Any, names: Mapping[str, Any]) -> bool:
    """Whether the model's class is one of a table of transformers'."""
    mine = type(model).__name__
    return any(mine == entry or (isinstance(entry, tuple) and mine in entry) for entry in names.values())


def _reads(model: Any) -> str:
    """The role that the model's main input is made of."""
    return MEDIA.get(getattr(model, "main_input_name", "input_ids"), "audio")


def _of_one_kind(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows that make one batch: a pair of texts is made of other tokens than a text alone."""
    return (list(found) for _, found in groupby(rows, lambda row: row.get("pair") is None))


def class_of(label: Any, model: Any) -> int:
    """A label as the number of the model's class: by its name, exactly or but for case, else by its number.

    Where the model's classes are called by numbers, a number is a name. Raises CalibrationError for a label that the
    model does not have.
    """
    if isinstance(label, list | tuple):
        raise CalibrationError(
            f"a row has several labels ({label!r}), and this task has one a row; compare the model with the dense one "
            "on texts alone, by kl_divergence and top1_agreement of each class"
        )
    known = {str(name): int(number) for name, number in (model.config.label2id or {}).items()}
    number = int(label) if isinstance(label, Place) else _by_name(str(label), known)
    if number is None and (isinstance(label, int) or _is_number(str(label))) and not any(map(_is_number, known)):
        number = int(label)
    if number is None or not 0 <= number < model.config.num_labels:
        raise CalibrationError(
            f"the data has the label {label!r}, but the model's are {', '.join(map(str, model.config.label2id))}; "
            "rename the labels, or take the model that they belong to"
        )
    return number


def _by_name(label: str, known: Mapping[str, int]) -> int | None:
    """The class of that name, or the only one whose name differs by case alone."""
    alike = {number for name, number in known.items() if name.lower() == label.lower()}
    return known.get(label, alike.pop() if len(alike) == 1 else None)


def _is_number(name: str) -> bool:
    return re.fullmatch(r"-?\d+", name) is not None


def between_classes(own: Columns, dense: Columns) -> Columns:
    """KL(dense || own) of each row's classes, and whether both choose the same."""
    if "log_probabilities" not in own or own["log_probabilities"][0].shape != dense["log_probabilities"][0].shape:
        return {}
    pair = torch.stack(own["log_probabilities"]), torch.stack(dense["log_probabilities"])
    divergence = F.kl_div(*pair, reduction="none", log_target=True).double().sum(-1)
    return {"divergence": divergence.tolist(), "agreeing": same(own["prediction"], dense["prediction"])}
