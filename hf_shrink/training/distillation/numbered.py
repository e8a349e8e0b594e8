"""Examples that know their number, through shuffling, collating and accumulation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.data import Dataset

from hf_shrink.errors import CalibrationError

NUMBER = "example_number"  # key of a batch


class Numbered(Dataset[dict[str, Any]]):
    """A map-style data set whose examples carry their number."""

    def __init__(self, dataset: Any) -> None:
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise CalibrationError(
                "a cached teacher finds its predictions by the number of an example, which a data set that is read as "
                "a stream does not have; load it whole, or use the teacher in memory"
            )
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {**self._dataset[number], NUMBER: int(number)}


class NumberedCollator:
    """Puts numbers aside while another collator makes a batch of the examples."""

    def __init__(self, collator: Callable[[list[Any]], Mapping[str, Any]]) -> None:
        self._collator = collator

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        if not examples or NUMBER not in examples[0]:  # data to evaluate on
            return dict(self._collator(examples))
        numbers = [example[NUMBER] for example in examples]
        batch = self._collator([{k: v for k, v in example.items() if k != NUMBER} for example in examples])
        return {**batch, NUMBER: torch.tensor(numbers)}
