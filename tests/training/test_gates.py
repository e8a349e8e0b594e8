"""Schedule, gates and scores, against plain references."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_shrink import RecipeError
from hf_shrink.training.pruning.collecting import Collected
from hf_shrink.training.pruning.gate import Gate, remove_gates
from hf_shrink.training.pruning.scoring import SCORES
from hf_shrink.training.schedule import Schedule, Window


def test_the_schedule_is_cubic_and_ends_where_it_says() -> None:
    window = Schedule(0.1, 0.7).window(1000)
    assert window == Window(100, 700, 12)
    assert window.progress(100) == 0 and window.progress(700) == window.progress(900) == 1
    assert window.progress(400) == pytest.approx(1 - 0.5**3)
    steps = [step for step in range(1, 1001) if window.due(step)]
    assert steps[:2] == [112, 124] and steps[-2:] == [688, 700]
    assert Schedule(0.0, 0.0).window(5) == Window(0, 1, 1)  # at once
    assert Schedule(1.0, 1.0).window(1) == Window(0, 1, 1)


@pytest.mark.parametrize("bad", [{"start": 0.8}, {"start": -0.1}, {"end": 2}, {"every": 0}, {"every": True}])
def test_what_is_no_schedule_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(RecipeError):
        Schedule(**bad)  # type: ignore[arg-type]


def mask_gradients(x: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """dL/dm of every sample by itself, float64 (samples, units), L = the sum of squares of a sample's outputs."""
    rows = []
    for sample in x.double():
        m = mask.double().clone().requires_grad_()
        spread = torch.ones(x.shape[-1], dtype=torch.float64).index_put(
            (index.reshape(-1),), m.repeat_interleave(index.shape[1])
        )
        ((sample * spread) @ weight.double().T).square().sum().backward()
        assert m.grad is not None
        rows.append(m.grad)
    return torch.stack(rows)


# Units of two inputs that do not lie side by side, and an input that belongs to none.
INDEX = torch.tensor([[0, 3], [1, 4], [2, 6]])
REFERENCE = {"taylor": lambda g: g.abs().sum(0), "fisher": lambda g: g.square().sum(0), "movement": lambda g: -g.sum(0)}


@pytest.mark.parametrize("name", REFERENCE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_masks_and_collects_what_every_sample_says(name: str, dtype: torch.dtype) -> None:
    linear = nn.Linear(7, 5, bias=False).to(dtype)
    gate = Gate(INDEX, SCORES.build(name, {}))
    gate.reset(torch.device("cpu"))
    Gate(INDEX, None).place(linear)
    remove_gates(linear)  # an earlier training's
    gate.place(linear)
    gate.close(torch.tensor([True, False, True]))
    batches = [torch.randn(3, 4, 7).to(dtype), torch.randn(2, 4, 7).to(dtype)]
    for x in batches:  # accumulated
        linear(x.requires_grad_()).float().square().sum().backward()
        assert (x.grad[..., [1, 4]] == 0).all() and (x.grad[..., [0, 2, 3, 5, 6]] != 0).any(-1).all()
    assert (linear.weight.grad[:, [1, 4]] == 0).all()
    mask = torch.tensor([1.0, 0.0, 1.0])
    found = torch.cat(
        [mask_gradients(x.detach().float(), linear.weight.detach().float(), mask, INDEX) for x in batches]
    )
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.5}
    torch.testing.assert_close(gate.collected().double(), REFERENCE[name](found), **tolerance)
    assert not gate.collected().any()  # and begins anew
    gate.settle()
    linear(batches[0]).float().sum().backward()
    assert gate.mask.grad is None


def test_scores_run_scaled_and_what_went_stays_unless_it_may_return() -> None:
    kept = torch.tensor([True, False, True])
    for name, returns in (("taylor", False), ("movement", True)):
        collected = Collected(SCORES.build(name, {}), [1, 2])
        for found in ([2.0, 8.0, 6.0], [4.0, 4.0, 4.0], [float("inf"), 0.0, 0.0]):  # the last one overflowed
            collected.add([torch.tensor(found[:1]), torch.tensor(found[1:])], scale=2.0)
        _, costs = collected.costs(kept)
        if returns:
            assert costs.tolist() == [1.0, 0.0]  # 6 and 5, above the least
        else:
            expected = (3.0 * 0.05) * 0.95 + 2.0 * 0.05
            assert costs.tolist() == pytest.approx([0.0, expected])
