"""What a model writes to be tuned on beside the calibration data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import VOCABULARY, tiny_llama
from tiny_readers import tiny_bert

from hf_shrink import shrink
from hf_shrink.errors import RecipeError
from hf_shrink.progress import quiet
from hf_shrink.tuning import Tuning, own_text, spread_evenly

ROWS, LENGTH = 12, 160


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(3, VOCABULARY, (2, LENGTH), generator=generator)} for _ in range(ROWS // 2)]


def short() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": batch["input_ids"][:, :48]} for batch in batches()]


def written(seed: int = 0, **options: Any) -> torch.Tensor:
    given = Tuning(**{"steps": 100, "own_text": 0.5, **options})
    return torch.cat([b["input_ids"] for b in own_text(tiny_llama(), batches(), given, None, seed, quiet)])


def test_there_is_as_much_as_was_asked_for_and_no_more_than_is_read() -> None:
    text = written()
    assert text.shape == (ROWS // 2, LENGTH) and int(text.min()) >= 0 and int(text.max()) < VOCABULARY
    assert written(own_text=1.0).shape == (ROWS, LENGTH)
    # A third of 2 x 480 tokens is own text.
    assert written(steps=2, tokens=480).shape == (2, LENGTH)


def test_the_seed_decides_what_is_written() -> None:
    assert torch.equal(written(), written())
    assert (written(1) != written()).float().mean() > 0.5


def test_it_is_likelier_text_than_chance() -> None:
    model, text = tiny_llama(), written(own_text=1.0)
    chance = torch.randint(3, VOCABULARY, text.shape, generator=torch.Generator().manual_seed(0))

    def loss(rows: torch.Tensor) -> float:
        with torch.no_grad():
            return float(model(rows[:, :120], labels=rows[:, :120]).loss)

    assert loss(text) < loss(chance) - 0.5


def test_two_sequences_are_spread_over_each_other() -> None:
    assert spread_evenly("abcd", "XY") == ["a", "X", "b", "c", "Y", "d"]
    assert spread_evenly("ab", "") == ["a", "b"]


@pytest.mark.parametrize(
    ("build", "data", "note"),
    [
        (tiny_llama, batches, "tuning also saw 640 tokens that the model wrote"),
        (tiny_llama, lambda: "self", None),
        (
            tiny_bert,
            lambda: [{"input_ids": b["input_ids"][:, :48]} for b in batches()],
            "tuning saw calibration data alone",
        ),
    ],
    ids=["text", "own text already", "an encoder"],
)
def test_the_report_says_what_was_tuned_on(build: Any, data: Any, note: str | None) -> None:
    step = {"method": "rtn", "scheme": "W4A16", "group_size": 16, "tune": {"steps": 2, "own_text": 0.5}}
    recipe = {"calibration": {"samples": ROWS, "length": 32}, "steps": [{"quantize": step}]}
    model = shrink(build(), recipe, calibration=data(), progress=False)
    found = [line for line in model.shrink_report.notes if "tune.own_text" in line]
    assert len(found) == (note is not None) and all(line.startswith(str(note)) for line in found)


@pytest.mark.parametrize("share", [-0.1, 11, "half", True])
def test_a_share_that_is_none(share: Any) -> None:
    with pytest.raises(RecipeError, match=r"tune.own_text must be a number from 0 to 10"):
        Tuning(steps=1, own_text=share)
