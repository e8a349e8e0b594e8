"""The asymmetric target against float64, and what held-out tokens do to it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from quantization_cases import case

from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.pipeline.packing import Task, solve
from hf_shrink.plan import Scheme
from hf_shrink.quantization import gptq
from hf_shrink.quantization.drift import DAMPINGS, corrected, held_out_loss
from hf_shrink.quantization.gptq import GPTQ


def drifted(tokens: int = 600, strength: float = 0.2, seed: int = 0):
    """A weight, the compressed model's inputs, and the dense model's: a mixed and noisy version of them."""
    weight, x = case(tokens=tokens, seed=seed)
    draw = torch.Generator().manual_seed(seed + 1)
    mix = torch.eye(48) + strength * torch.randn(48, 48, generator=draw) / 48**0.5
    return weight, x, x @ mix.T + 0.05 * torch.randn(x.shape, generator=draw)


def gathered(x: torch.Tensor, dense: torch.Tensor, held: int) -> InputStatistics:
    """Statistics over all tokens, with the drift measured on all but the last `held`."""
    statistics = InputStatistics.empty(x.shape[1])
    statistics.add_drift(x[:-held], dense[:-held], held_out=False)
    statistics.add_drift(x[-held:], dense[-held:], held_out=True)
    return statistics.finish("x")


@pytest.mark.parametrize("tokens", [160, 600])
def test_it_is_the_least_squares_answer_that_held_out_tokens_like_best(tokens: int) -> None:
    weight, x, dense = drifted(tokens)
    found, part = corrected(weight, gathered(x, dense, 50))
    x64, drift = x[:-50].double(), (dense - x)[:-50].double()
    missing = (dense - x)[-50:].double() @ weight.double().T
    answers = []
    for damping in DAMPINGS:
        hessian = x64.T @ x64
        hessian += damping * hessian.diagonal().mean() * torch.eye(48, dtype=torch.float64)
        change = weight.double() @ drift.T @ x64 @ torch.linalg.inv(hessian)
        given = x[-50:].double() @ change.T
        best = min(max(float((missing * given).sum() / given.square().sum()), 0.0), 1.0)
        answers.append((float((missing - best * given).square().sum()), best, weight.double() + best * change))
    _, expected_part, expected = min(answers, key=lambda answer: answer[0])
    assert part == pytest.approx(expected_part, abs=1e-3)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def test_a_linear_drift_is_found_from_few_tokens() -> None:
    """Whatever the second moment of the other tokens is: it does not come into the correction."""
    weight, x, _ = drifted(tokens=900)
    draw = torch.Generator().manual_seed(5)
    mix = torch.eye(48) + 0.2 * torch.randn(48, 48, generator=draw) / 48**0.5
    statistics = InputStatistics.empty(48)
    statistics.add(10 * x[200:])
    statistics.add_drift(x[:150], x[:150] @ mix.T, held_out=False)
    statistics.add_drift(x[150:200], x[150:200] @ mix.T, held_out=True)
    found, part = corrected(weight, statistics.finish("x"))
    assert part > 0.95
    exact = weight @ mix
    assert (found - exact).norm() < 0.5 * (weight - exact).norm()


def test_outputs_come_nearer_to_the_dense_model_on_fresh_tokens() -> None:
    weight, x, dense = drifted()
    found, part = corrected(weight, gathered(x[:500], dense[:500], 80))
    assert part > 0.5

    def distance(w: torch.Tensor) -> float:
        return float((x[500:] @ w.T - dense[500:] @ weight.T).square().sum())

    assert distance(found) < 0.5 * distance(weight)


def test_a_correction_that_held_out_tokens_deny_is_not_taken() -> None:
    weight, x, dense = drifted()
    against = torch.cat([dense[:-100], x[-100:] - (dense - x)[-100:]])  # there the drift goes the other way
    found, part = corrected(weight, gathered(x, against, 100))
    assert part == 0
    assert torch.equal(found, weight)


@pytest.mark.parametrize("tokens", [2, 30])
def test_few_tokens_and_dead_channels(tokens: int) -> None:
    weight, x, dense = drifted(tokens)
    x[:, 3], dense[:, 3] = 0, 0
    statistics = gathered(x, dense, 1)
    found, _ = corrected(weight, statistics)
    assert torch.isfinite(found).all()
    result = GPTQ().solve(weight, Scheme(4, True, "group", 16), statistics, scale_dtype=torch.float32)
    assert torch.isfinite(result.dequantized()).all()


def test_without_a_drift_nothing_changes() -> None:
    weight, x, dense = drifted()
    statistics = InputStatistics.empty(48)
    statistics.add(x)
    statistics.finish("x")
    assert corrected(weight, statistics) == (weight, 0.0)
    scheme = Scheme(3, True, "group", 16)
    same = [GPTQ(asymmetric=on).solve(weight, scheme, statistics, scale_dtype=torch.float32) for on in (True, False)]
    assert torch.equal(same[0].values, same[1].values)
    aimed = GPTQ().solve(weight, scheme, gathered(x, dense, 100), scale_dtype=torch.float32).dequantized()

    def distance(w: torch.Tensor) -> float:
        return float((x @ w.T - dense @ weight.T).square().sum())

    assert distance(aimed) < distance(same[1].dequantized())


def test_what_corrections_come_from_goes_with_the_last() -> None:
    """Two groups of matrices, of schemes of their own, read the same inputs."""
    weight, x, dense = drifted()
    statistics = gathered(x, dense, 50)
    drift = statistics.drift
    assert drift is not None
    expected, part = corrected(weight, statistics)
    assert part > 0 and drift.measured.tokens > 0  # nobody said how many there would be
    module = torch.nn.Linear(48, len(weight))
    module.weight = torch.nn.Parameter(weight)
    tasks = [
        Task(f"{bits}", module if bits == 4 else copy.deepcopy(module), Scheme(bits), statistics, torch.float32)
        for bits in (4, 8)
    ]
    left = []

    class Noting(GPTQ):
        def solve(self, weight: torch.Tensor, scheme: Scheme, *args: Any, **kwargs: Any) -> Any:
            torch.testing.assert_close(corrected(weight, statistics)[0], expected, rtol=0, atol=0)
            left.append((drift.corrections, drift.measured.tokens > 0))
            return GPTQ(asymmetric=False).solve(weight, scheme, *args, **kwargs)

    solve(tasks, Noting())
    assert left == [(1, True), (0, False)]
    with pytest.raises(AssertionError, match="all corrections have been made"):
        corrected(weight, statistics)


def test_held_out_loss_is_the_distance_up_to_a_constant() -> None:
    weight, x, dense = drifted()
    drift = gathered(x, dense, 100).drift
    assert drift is not None
    held, moved = x[-100:].double(), (dense - x)[-100:].double()
    constant = float((moved @ weight.double().T).square().sum())
    for seed in range(3):
        other = weight + 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        exact = float((((held + moved) @ weight.double().T) - held @ other.double().T).square().sum())
        assert held_out_loss(weight, other, drift) == pytest.approx(exact - constant, rel=1e-4)


def test_damping_is_the_best_on_held_out_tokens() -> None:
    weight, x, dense = drifted(tokens=80)  # few, so that it matters
    statistics, scheme = gathered(x, dense, 20), Scheme(3, True, "group", 16)
    tried = {
        damping: GPTQ(damping=damping).solve(weight, scheme, statistics, scale_dtype=torch.float32).dequantized()
        for damping in gptq.DAMPINGS
    }
    assert statistics.drift is not None
    losses = {damping: held_out_loss(weight, found, statistics.drift) for damping, found in tried.items()}
    best = min(losses, key=losses.__getitem__)
    found = GPTQ().solve(weight, scheme, statistics, scale_dtype=torch.float32)
    assert torch.equal(found.dequantized(), tried[best])
    assert losses[best] < max(losses.values())
