"""The least squares behind the repair: against a float64 reference, and what tokens held out decide."""

from __future__ import annotations

import pytest
import torch

from hf_shrink.errors import CalibrationError
from hf_shrink.pruning.repair import DAMPINGS, Errors, best_change
from hf_shrink.sharding import share


def problem(tokens: int = 400, noise: float = 0.0, seed: int = 0) -> tuple[Errors, torch.Tensor, torch.Tensor]:
    """Errors of a matrix that lacks `missing`; a few targets are a hundred times as long as the others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 12, generator=generator)
    missing = torch.randn(5, 12, generator=generator)
    target = torch.randn(tokens, 5, generator=generator)
    target[::50] *= 100
    error = x @ missing.T + noise * target.norm(dim=-1, keepdim=True) * torch.randn(tokens, 5, generator=generator)
    errors = Errors.empty(5, 12, torch.device("cpu"))
    held = torch.arange(tokens) % 8 == 7
    errors.add(x[~held], error[~held], target[~held], held_out=False)
    errors.add(x[held], error[held], target[held], held_out=True)
    weight = (1 / target.double().square().sum(-1))[~held]
    cross = torch.einsum("n,no,ni->oi", weight, error[~held].double(), x[~held].double())
    moment = torch.einsum("n,no,ni->oi", weight, x[~held].double(), x[~held].double())
    damped = moment + DAMPINGS[0] * moment.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    return errors, missing, torch.linalg.solve(damped, cross.T).T


def test_what_is_missing_is_found_by_weighted_least_squares() -> None:
    errors, missing, reference = problem()
    change, gain = best_change(errors)
    torch.testing.assert_close(change.double(), reference, rtol=1e-4, atol=1e-5)
    assert (change - missing).norm() < 0.1 * missing.norm()
    assert gain > 0.98


def test_half_of_a_moment_is_as_good_as_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = problem()[0]
    monkeypatch.setattr("hf_shrink.pruning.repair.BAND", 5)  # three bands, the last of two columns
    half = problem()[0]
    half.merge(share(1))
    for name in ("moment", "held_moment"):
        torch.testing.assert_close(getattr(half, name), getattr(whole, name), rtol=1e-5, atol=1e-6)


def test_noise_is_damped_and_never_taken_where_it_does_not_serve_tokens_held_out() -> None:
    few, missing, reference = problem(tokens=32, noise=1.0)
    change, gain = best_change(few)
    assert (change - missing).norm() < (reference - missing).norm() and 0 <= gain < 1
    few.held_cross.neg_()
    change, gain = best_change(few)
    assert not change.any() and gain == 0


def test_one_token_and_dead_inputs_are_no_trouble_and_nan_is() -> None:
    errors = Errors.empty(3, 4, torch.device("cpu"))
    assert not best_change(errors)[0].any()
    errors.add(torch.tensor([[1.0, 0, 2, 0]]), torch.ones(1, 3), torch.ones(1, 3), held_out=False)
    errors.add(torch.tensor([[1.0, 0, 2, 0]]), torch.ones(1, 3), torch.ones(1, 3), held_out=True)
    change, gain = best_change(errors)
    assert not change[:, [1, 3]].any() and gain > 0.9
    errors.cross[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        best_change(errors)
