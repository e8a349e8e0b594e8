"""Tiny models of every task head, data for them, and Trainers that run for a few steps. No download."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from conformance.cases_encoders import CASES, IMAGE, PAIR, TEXT, VOCABULARY
from tiny import tiny_llama
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForQuestionAnswering,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

Row = dict[str, Tensor]


class Rows(torch.utils.data.Dataset[Row]):
    """16 rows, each drawn from its number."""

    def __init__(self, make: Callable[[torch.Generator], Row]) -> None:
        self._make = make

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Row:
        return self._make(torch.Generator().manual_seed(index))


def ids(draw: torch.Generator, length: int = 10) -> Tensor:
    return torch.randint(5, VOCABULARY, (length,), generator=draw)


def number(draw: torch.Generator, below: int) -> Tensor:
    return torch.randint(below, (), generator=draw)


def language(draw: torch.Generator) -> Row:
    tokens = ids(draw)
    return {"input_ids": tokens, "labels": tokens}


def sequence_class(draw: torch.Generator) -> Row:
    return {"input_ids": ids(draw), "labels": number(draw, 2)}


def token_class(draw: torch.Generator) -> Row:
    return {"input_ids": ids(draw), "labels": torch.randint(2, (10,), generator=draw)}


def answer(draw: torch.Generator) -> Row:
    return {"input_ids": ids(draw), "start_positions": number(draw, 5), "end_positions": 5 + number(draw, 5)}


def pair(draw: torch.Generator) -> Row:
    return {"input_ids": ids(draw), "labels": ids(draw, 7)}


def image(draw: torch.Generator) -> Row:
    return {"pixel_values": torch.randn(3, 16, 16, generator=draw), "labels": number(draw, 2)}


def speech(draw: torch.Generator) -> Row:
    return {"input_features": torch.randn(10, 24, generator=draw), "labels": ids(draw, 7)}


def _seeded(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return kind(config)


def tiny_vit(**changes: Any) -> PreTrainedModel:
    """3 blocks, hidden 40, 5 heads, 56 channels."""
    return _seeded(ViTForImageClassification, ViTConfig(**IMAGE, **changes))


TASKS: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[torch.Generator], Row]]] = {
    "causal language model": (lambda: tiny_llama(num_hidden_layers=2), language),
    "masked language model": (CASES["bert_masked_lm"].build, language),
    "sequence classification": (CASES["distilbert_classifier"].build, sequence_class),
    "token classification": (CASES["xlm_roberta_tagger"].build, token_class),
    "question answering": (lambda: _seeded(BertForQuestionAnswering, BertConfig(**TEXT)), answer),
    "sequence to sequence": (CASES["t5"].build, pair),
    "image classification": (tiny_vit, image),
    "speech recognition": (CASES["whisper"].build, speech),
}
MORE: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[torch.Generator], Row]]] = {
    "bart": (
        lambda: _seeded(BartForConditionalGeneration, BartConfig(**PAIR, max_position_embeddings=40)),
        pair,
    ),
}


def width(ratio: float = 0.3, method: str = "taylor", **options: Any) -> dict[str, Any]:
    return {"steps": [{"prune": {"what": "width", "method": method, "ratio": ratio, **options}}]}


def weights(method: str = "magnitude", **options: Any) -> dict[str, Any]:
    return {"steps": [{"prune": {"what": "weights", "method": method, **options}}]}


def quantize(scheme: str = "W4A16", **options: Any) -> dict[str, Any]:
    """Groups of 16 where the scheme has groups."""
    grouped = scheme.endswith("6") and not scheme.startswith("FP") and "strategy" not in options
    form = {"group_size": 16} if grouped else {}
    return {"steps": [{"quantize": {"method": "rtn", "scheme": scheme, **form, **options}}]}


def trainer(
    model: PreTrainedModel,
    make: Callable[[torch.Generator], Row],
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
    **settings: Any,
) -> Trainer:
    """8 steps of 4 rows on the CPU, silent."""
    chosen: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**(chosen | settings)),
        train_dataset=Rows(make),
        eval_dataset=Rows(make),
        callbacks=list(callbacks),
    )


def outputs(model: PreTrainedModel, make: Callable[[torch.Generator], Row]) -> dict[str, Tensor]:
    """What a model says of 4 rows, in eval mode: everything but lists of states."""
    rows = [Rows(make)[index] for index in range(4)]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    training = model.training
    with torch.no_grad():
        found = model.eval()(**batch)
    model.train(training)
    return {key: value for key, value in found.items() if isinstance(value, Tensor)}
