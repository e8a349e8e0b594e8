"""Second moments with shortened rows, with a constant beside the inputs, and without their mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_shrink.calibration.statistics import InputStatistics


def inputs(seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 6, generator=draw) + torch.tensor([0.0, 1, 2, 0, -3, 0.5])
    x[17] *= 1000  # massive activations
    return x


def gathered(x: Tensor, longest: float | None, dense: Tensor | None = None) -> InputStatistics:
    found = InputStatistics.empty(6, longest=longest)
    if dense is None:
        found.add(x)
    else:
        found.add_drift(x[:150], dense[:150], held_out=False)
        found.add_drift(x[150:], dense[150:], held_out=True)
    return found.finish("x")


def factors(x: Tensor, longest: float) -> Tensor:
    lengths = x.double().norm(dim=1, keepdim=True)
    return (longest * lengths.median() / lengths).clamp(max=1)


def test_long_rows_are_shortened_and_others_are_not() -> None:
    x = inputs()
    short = x.double() * factors(x, 4.0)
    found = gathered(x, 4.0)
    torch.testing.assert_close(found.hessian.double(), short.T @ short, rtol=1e-4, atol=1e-3)
    assert found.tokens == 200 and 199 < found.weight < 199.1
    torch.testing.assert_close(gathered(x, None).hessian.double(), x.double().T @ x.double(), rtol=1e-4, atol=1)
    ordinary = torch.cat([x[:17], x[18:]])
    torch.testing.assert_close(gathered(ordinary, 4.0).hessian, gathered(ordinary, None).hessian)


@pytest.mark.parametrize("longest", [None, 4.0])
def test_a_constant_beside_the_inputs_is_shortened_with_them(longest: float | None) -> None:
    x = inputs()
    dense = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) + 0.3
    wide, wide_dense = (torch.cat([t, torch.full((200, 1), 2.0)], 1).double() for t in (x, dense))
    change = wide_dense - wide
    # Added in parts, each with a median of its own.
    parts = [factors(p, longest).square() if longest else torch.ones(len(p), 1).double() for p in (x[:150], x[150:])]
    found = gathered(x, longest, dense).with_constant(2.0)
    drift = found.drift
    assert drift is not None and (drift.measured.tokens, drift.held.tokens, found.tokens) == (150, 50, 200)
    for sums, expected in (
        (found.hessian, wide.T @ (torch.cat(parts) * wide)),
        (drift.measured.cross, change[:150].T @ (parts[0] * wide[:150])),
        (drift.measured.hessian, wide[:150].T @ (parts[0] * wide[:150])),
        (drift.held.cross, change[150:].T @ (parts[1] * wide[150:])),
        (drift.held.hessian, wide[150:].T @ (parts[1] * wide[150:])),
    ):
        torch.testing.assert_close(sums.double(), expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("longest", [None, 4.0])
def test_the_covariance_is_what_is_left_beside_a_constant(longest: float | None) -> None:
    x = inputs()
    weight = factors(x, longest).square() if longest else torch.ones(200, 1).double()
    mean = (weight * x).sum(0) / weight.sum()
    centred = x.double() - mean
    expected = centred.T @ (weight * centred) / 200
    torch.testing.assert_close(gathered(x, longest).covariance.double(), expected, rtol=1e-3, atol=1e-3)


def test_mostly_empty_rows_shorten_nothing() -> None:
    x = torch.zeros(9, 6)
    x[3] = 5
    assert torch.equal(gathered(x, 4.0).hessian, gathered(x, None).hessian)
