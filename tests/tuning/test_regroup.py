"""Batches put together to the size of an optimizer step."""

from __future__ import annotations

from typing import Any

import torch

from hf_shrink.tuning import regrouped


def rows(count: int, length: int = 10, start: int = 0) -> dict[str, Any]:
    ids = torch.arange(start, start + count * length).view(count, length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_single_rows_are_joined_up_to_the_tokens_of_a_step() -> None:
    batches = [rows(1, start=10 * n) for n in range(50)]
    found = regrouped(batches, 40)
    assert [len(b["input_ids"]) for b in found] == [4] * 12 + [2]
    assert torch.equal(torch.cat([b["input_ids"] for b in found]), torch.cat([b["input_ids"] for b in batches]))
    assert all(b["attention_mask"].shape == b["input_ids"].shape for b in found)


def test_a_few_batches_are_left_however_large_a_step_may_be() -> None:
    assert len(regrouped([rows(1) for _ in range(16)], 10**6)) == 8
    assert len(regrouped([rows(1) for _ in range(2)], 10**6)) == 2


def test_what_does_not_fit_together_stays_apart() -> None:
    short, long, image = rows(2, 4), rows(2, 5), {"pixel_values": torch.zeros(2, 3, 4, 4)}
    mixed: list[dict[str, Any]] = [short, long, long, image, {**short, "labels": None}, {**short, "labels": None}]
    found = regrouped([*mixed, *[rows(1, 4)] * 60], 64)
    assert [len(next(iter(b.values()))) for b in found[:5]] == [2, 4, 2, 2, 2]
    assert "labels" in found[3] and "labels" in found[4]
    halves = [{"pixel_values": torch.zeros(1, 3, 4, 4, dtype=d)} for d in (torch.float32, torch.bfloat16)]
    assert len(regrouped(halves * 8, 10**6)) == 16


def test_images_are_counted_by_the_row() -> None:
    found = regrouped([{"pixel_values": torch.zeros(2, 3, 4, 4)} for _ in range(32)], 256)
    assert [len(b["pixel_values"]) for b in found] == [4] * 16
