"""Shifts change no output, narrow what tokens' grids must cover, and help where inputs are rounded."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from conformance.references import outputs
from scipy.optimize import minimize
from tiny import tiny_llama
from tiny_readers import tiny_bert
from torch import Tensor
from transforms.test_folding import EVERY, every_family, worst

from hf_shrink import shrink
from hf_shrink.architectures import bind
from hf_shrink.architectures.shiftable import Shiftable, find_shiftable
from hf_shrink.errors import RecipeError
from hf_shrink.pipeline import shifting
from hf_shrink.recipe.effort import expand
from hf_shrink.transforms import TRANSFORMS, Shifting
from hf_shrink.transforms.fold import fold_shift
from hf_shrink.transforms.shift import Shift, squared_step

# Norms that are shifted: two a block, but for the embeddings' own in front of a first block whose norms come behind.
EXPECTED = {"bert": 5, "distilbert_classifier": 5, "opt": 2 * 4, "vit": 2 * 3, "llama": 0}


def shiftable(model: Any) -> list[Shiftable]:
    return [found for stack in bind(model).stacks for found in find_shiftable(model, stack).found]


@every_family
def test_shifts_change_nothing(name: str) -> None:
    build, inputs = EVERY[name]
    model = build().double()
    given = {k: v.double() if v.is_floating_point() else v for k, v in inputs().items()}
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if n.endswith("bias")):
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    before, found = outputs(model, given), shiftable(model)
    assert EXPECTED.keys() <= EVERY.keys() and EXPECTED.get(name, len(found)) == len(found)
    for each in found:
        width = model.get_submodule(each.norm).bias.numel()
        constants = torch.randn(width, generator=torch.Generator().manual_seed(1))
        used = fold_shift(model, each.norm, each.readers, each.carrier, constants)
        torch.testing.assert_close(used.float(), constants)
    # Norms that compute in float32 whatever they are given take float32's rounding along.
    assert worst(before, outputs(model, given)) < 2e-5


def skewed(tokens: int = 400, channels: int = 6) -> Tensor:
    rows = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(0))
    return rows * torch.tensor([1, 1, 1, 3, 0.5, 1]) + torch.tensor([0, 8, -5, 1, 0, -2.0])


@pytest.mark.parametrize("symmetric", [False, True])
def test_steps_are_as_small_as_they_can_be(symmetric: bool) -> None:
    rows = skewed().double()
    found = Shift(steps=2000).constants(rows, symmetric)

    def slow(shift: np.ndarray[Any, Any]) -> float:
        moved = rows.numpy() - shift
        if symmetric:
            return float(((2 * np.abs(moved).max(1)) ** 2).mean())
        return float(((np.maximum(moved.max(1), 0) - np.minimum(moved.min(1), 0)) ** 2).mean())

    assert float(squared_step(rows, found, symmetric)) == pytest.approx(slow(found.numpy()))
    least = min(minimize(slow, start, method="Powell").fun for start in (np.zeros(6), rows.mean(0).numpy()))
    assert slow(found.numpy()) < 1.03 * least < 0.2 * slow(np.zeros(6))


def test_it_never_widens_what_it_was_not_fitted_on() -> None:
    rows = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))  # nothing to find, much to fit
    held = rows[3::4]
    found = Shift().constants(rows, False)
    assert squared_step(held, found, False) <= squared_step(held, torch.zeros(30), False)
    assert torch.equal(Shift().constants(rows, False), found)


def built() -> Any:
    """A BERT whose norms put a few channels far from zero."""
    model = tiny_bert()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm.bias" in name:
                parameter[:4] += torch.tensor([9.0, -7.0, 5.0, 6.0])
    return model


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(4, 24, dtype=torch.int64)
    mask[1, 12:] = 0
    return [{"input_ids": torch.randint(5, 300, (4, 24), generator=generator), "attention_mask": mask}] * 3


def lost(dense: Any, transforms: list[str], scheme: str = "W8A8") -> tuple[float, list[str]]:
    model = copy.deepcopy(dense)
    step = {"method": "rtn", "scheme": scheme, "transforms": transforms}
    step |= {"group_size": 16} if scheme == "W4A16" else {}
    shrink(model, {"portable": False, "steps": [{"quantize": step}]}, calibration=batches(), progress=False)
    with torch.no_grad():
        before, after = (m(**batches()[0]).last_hidden_state for m in (dense, model))
    return float((after - before).norm() / before.norm()), model.shrink_report.notes


def test_rounded_inputs_lose_less() -> None:
    dense = built()
    plain, shifted = lost(dense, []), lost(dense, ["shift"])
    assert shifted[0] < 0.8 * plain[0]
    assert any("taken off the outputs of" in note for note in shifted[1])
    assert any("query, key, value were not shifted in 1 blocks" in note for note in shifted[1])


def test_few_tokens_are_kept_of_many_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    found = Shift.constants

    def watched(self: Shift, rows: Tensor, symmetric: bool) -> Tensor:
        seen.append(rows)
        return found(self, rows, symmetric)

    monkeypatch.setattr(shifting, "BYTES", 0)
    monkeypatch.setattr(shifting, "FEWEST", 100)
    monkeypatch.setattr(
        Shift, "constants", lambda self, rows, symmetric: seen.append(rows) or found(self, rows, symmetric)
    )
    lost(built(), ["shift"])
    assert {len(rows) for rows in seen} == {100}  # 84 of a batch are no padding
    seen.clear()
    monkeypatch.setattr(shifting, "FEWEST", 1000)
    lost(built(), ["shift"])
    assert {len(rows) for rows in seen} == {3 * 84}


def test_what_cannot_gain_is_left_alone() -> None:
    notes = lost(built(), ["shift"], "W4A16")[1]
    assert not any("taken off" in note for note in notes)
    assert any("shift makes activations easier to round, which this plan leaves in 16 bits" in note for note in notes)
    model, ids = tiny_llama(), [{"input_ids": torch.arange(5, 37).view(2, 16)}]
    step = {"method": "rtn", "scheme": "W8A8", "transforms": ["shift"]}
    shrink(model, {"portable": False, "steps": [{"quantize": step}]}, calibration=ids, progress=False)
    assert any("no bias" in note for note in model.shrink_report.notes)


def test_efforts_that_take_data_shift_what_rounds_its_inputs() -> None:
    assert expand({"effort": "balanced", "scheme": "W8A8"})["transforms"] == ["shift"]
    assert expand({"effort": "best", "scheme": "w8a8"})["transforms"] == ["shift"]
    for step in ({"effort": "fast", "scheme": "W8A8"}, {"effort": "balanced", "scheme": "W4A16"}):
        assert "transforms" not in expand(step)
    with pytest.raises(RecipeError, match="decides transforms"):
        expand({"effort": "balanced", "scheme": "W8A8", "transforms": ["smooth"]})
    assert isinstance(TRANSFORMS.build("shift", {}), Shifting)
    with pytest.raises((RecipeError, ValueError), match="steps must be a whole number"):
        TRANSFORMS.build("shift", {"steps": -1})
