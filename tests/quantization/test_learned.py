"""Learned rounding on a small block of its own: never worse on held-out batches, the same twice."""

from __future__ import annotations

import pytest
import torch
from quantization_cases import SCHEMES, case, statistics_of
from torch import Tensor

from hf_shrink.errors import CalibrationError, RecipeError
from hf_shrink.ops.grid import quantize, search_grid
from hf_shrink.ops.linalg import relative_error
from hf_shrink.ops.quantized import QuantizedWeight
from hf_shrink.plan import Scheme
from hf_shrink.quantization import METHODS
from hf_shrink.quantization.learned import Learned
from hf_shrink.runtime.linear import CompressedLinear
from hf_shrink.runtime.trainable import TrainableLinear


class TwoLayers:
    """relu(x A^T) B^T with both weights rounded to nearest, against the dense one, in batches of 50 tokens."""

    def __init__(self, scheme: Scheme, batches: int = 8) -> None:
        first, x = case(out=40, channels=48, tokens=50 * batches)
        second = torch.randn(12, 40, generator=torch.Generator().manual_seed(5))
        self.inputs = x.split(50)
        self.targets = (x @ first.T).relu().mm(second.T).split(50)
        self.weights = [self.rounded(weight, scheme) for weight in (first, second)]
        self.batches = batches

    @staticmethod
    def rounded(weight: Tensor, scheme: Scheme) -> TrainableLinear:
        grid = search_grid(weight, scheme, None, torch.float32)
        packed = CompressedLinear.from_quantized(QuantizedWeight(quantize(weight, grid), grid, 0.0), None)
        return TrainableLinear(packed, rounding=True, dense=weight)

    def loss(self, batch: int) -> Tensor:
        first, second = self.weights
        output, target = second(first(self.inputs[batch]).relu()), self.targets[batch]
        return (output - target).square().sum() / target.square().sum()

    def packed_error(self, batches: range) -> float:
        """float64, with the weights as they will be stored."""
        first, second = (weight.packed().weight.double() for weight in self.weights)
        lost = whole = 0.0
        for b in batches:
            target = self.targets[b].double()
            lost += float(
                ((self.inputs[b].double() @ first.T).relu() @ second.T - target).square().sum() / target.square().sum()
            )
            whole += 1
        return lost / whole


METHOD = Learned(steps=120, rounding_rate=0.02, scale_rate=0.003)


@pytest.mark.parametrize(
    "scheme", [Scheme(4, True, "group", 8), Scheme(2, False, "group", 8), Scheme(3, True, "channel", None)], ids=str
)
def test_the_error_of_what_is_stored_goes_down(scheme: Scheme) -> None:
    problem = TwoLayers(scheme)
    before = problem.packed_error(range(7, 8))
    learnt = METHOD.learn(problem, seed=0)
    assert learnt.before == pytest.approx(before, rel=1e-4)
    assert learnt.after == pytest.approx(problem.packed_error(range(7, 8)), rel=1e-4)
    assert learnt.after < 0.8 * learnt.before


def test_a_rate_that_ruins_the_block_changes_nothing() -> None:
    problem = TwoLayers(Scheme(4, True, "group", 8))
    stored = [weight.packed().state_dict() for weight in problem.weights]
    learnt = Learned(steps=20, rounding_rate=0.9, scale_rate=0.9).learn(problem, seed=0)
    assert learnt.after == learnt.before
    assert learnt.steps < 20  # it gave up early
    for weight, before in zip(problem.weights, stored, strict=True):
        for name, buffer in weight.packed().state_dict().items():
            assert torch.equal(buffer, before[name])


def test_same_seed_same_integers_other_seed_others() -> None:
    found = []
    for seed in (0, 0, 1):
        problem = TwoLayers(Scheme(3, True, "group", 8))
        METHOD.learn(problem, seed)
        found.append([weight.quantized().values for weight in problem.weights])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))


def test_one_batch_is_not_enough() -> None:
    with pytest.raises(CalibrationError, match=r"at least 2 batches.*calibration.samples"):
        METHOD.learn(TwoLayers(Scheme(4, True, "group", 8), batches=1), seed=0)


def test_one_batch_is_left_to_learn_from_however_many_are_held_out() -> None:
    problem = TwoLayers(Scheme(4, True, "group", 8), batches=2)
    learnt = Learned(steps=20, rounding_rate=0.02, scale_rate=0.003, held_out=0.9).learn(problem, seed=0)
    assert learnt.before == pytest.approx(TwoLayers(Scheme(4, True, "group", 8), 2).packed_error(range(1, 2)), rel=1e-4)
    assert learnt.after == pytest.approx(problem.packed_error(range(1, 2)), rel=1e-4)
    assert learnt.after < learnt.before


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_it_starts_no_worse_than_rounding_to_nearest(scheme: Scheme) -> None:
    weight, x = case()
    statistics = statistics_of(x)
    start = Learned().solve(weight, scheme, statistics, scale_dtype=torch.float32)
    plain = METHODS.build("rtn", {}).solve(weight, scheme, statistics, scale_dtype=torch.float32)
    errors = [relative_error(weight, q.dequantized(), statistics.mean) for q in (start, plain)]
    assert errors[0] <= errors[1]
    other = Learned(start="rtn").solve(weight, scheme, statistics, scale_dtype=torch.float32)
    assert torch.equal(other.values, plain.values)


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"rounding_rate": 0}, {"held_out": 1.5}, {"start": "learned"}, {"start": "nothing"}]
)
def test_options_are_checked(options: dict[str, object]) -> None:
    with pytest.raises(RecipeError):
        METHODS.build("learned", options)
