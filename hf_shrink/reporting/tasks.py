"""From a checkpoint's architecture to the Auto class that loads it and the Hub's name of its task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.models.auto import modeling_auto as auto


@dataclass(frozen=True)
class Task:
    """Which Auto class loads a model, and the Hub's tag of what it does (None: not known)."""

    auto_class: str
    tag: str | None


# Searched in this order: some classes stand in several mappings.
_KNOWN: tuple[tuple[Mapping[str, Any], Task], ...] = (
    (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, Task("AutoModelForCausalLM", "text-generation")),
    (auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, Task("AutoModelForMaskedLM", "fill-mask")),
    (
        auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        Task("AutoModelForSpeechSeq2Seq", "automatic-speech-recognition"),
    ),
    (auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, Task("AutoModelForImageTextToText", "image-text-to-text")),
    (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, Task("AutoModelForSeq2SeqLM", "text2text-generation")),
    (
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        Task("AutoModelForSequenceClassification", "text-classification"),
    ),
    (
        auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        Task("AutoModelForTokenClassification", "token-classification"),
    ),
    (auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, Task("AutoModelForQuestionAnswering", "question-answering")),
    (
        auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        Task("AutoModelForImageClassification", "image-classification"),
    ),
    (
        auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        Task("AutoModel", "zero-shot-image-classification"),
    ),
)


def task_of(architectures: Sequence[str] | None, measured: str | None = None) -> Task:
    """The task of a config's `architectures`; else what the evaluation took it for; else a plain AutoModel."""
    for name in architectures or ():
        for mapping, task in _KNOWN:
            if any(name == entry or (isinstance(entry, tuple) and name in entry) for entry in mapping.values()):
                return task
    known = {task.tag: task for _, task in _KNOWN}
    return known.get(measured, Task("AutoModel", None)) if not architectures else Task("AutoModel", None)
