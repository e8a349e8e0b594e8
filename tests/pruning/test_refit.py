"""The refit makes up for what was cut, on real activations, and is the least-squares solution."""

from __future__ import annotations

import pytest
import torch
from tiny import VOCABULARY, tiny_llama
from torch import Tensor

from hf_shrink.architectures import bind
from hf_shrink.architectures.bound import BoundBlock
from hf_shrink.architectures.linears import matrix
from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.calibration.walk import StackWalk
from hf_shrink.errors import CalibrationError
from hf_shrink.plan import BlockPlan
from hf_shrink.pruning.refit import refit_reader
from hf_shrink.surgery import cut_block

HEADS, CHANNELS = (0, 1, 4, 5), tuple(range(0, 80, 2))


def statistics(x: Tensor) -> InputStatistics:
    found = InputStatistics.empty(x.shape[-1])
    found.add(x)
    return found.finish("x")


def test_it_is_the_least_squares_solution() -> None:
    x = torch.randn(400, 24) @ torch.randn(24, 24)
    weight, kept = torch.randn(10, 24), torch.tensor([0, 3, 4, 11, 17, 20, 23])
    found = refit_reader(weight, None, statistics(x), kept, damping=0.0).weight
    target = x.double() @ weight.double().T
    expected = torch.linalg.lstsq(x[:, kept].double(), target).solution.T
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def test_keeping_everything_changes_nothing() -> None:
    x, weight = torch.randn(50, 12), torch.randn(5, 12)
    torch.testing.assert_close(refit_reader(weight, None, statistics(x), torch.arange(12)).weight, weight)


def test_inputs_that_say_nothing_leave_the_weight_as_it_is() -> None:
    weight, kept = torch.randn(5, 12), torch.tensor([1, 2, 7])
    found = refit_reader(weight, None, statistics(torch.zeros(9, 12)), kept).weight
    torch.testing.assert_close(found, weight[:, kept])


def test_not_finite_statistics_are_an_error() -> None:
    broken = InputStatistics(torch.full((4, 4), float("nan")), 3)
    with pytest.raises(CalibrationError):
        refit_reader(torch.randn(2, 4), None, broken, torch.tensor([0, 1]))


def outputs_after(refit: bool, part: str) -> tuple[list[Tensor], list[Tensor]]:
    """The second block's outputs before and after it loses units of one part."""
    model = tiny_llama()
    data = [
        {"input_ids": torch.randint(3, VOCABULARY, (8, 40), generator=torch.Generator().manual_seed(b))} for b in (0, 1)
    ]
    stack = bind(model).stacks[0]
    walk = StackWalk(model, [block.module for block in stack.blocks], data)
    walk.advance()
    block: BoundBlock = stack.blocks[1]
    dense = walk.outputs()
    role, owner, kept = ("down", block.mlp, CHANNELS) if part == "mlp" else ("output", block.attention, HEADS)
    assert owner is not None
    slot = owner.slot(role)
    module = owner.modules[slot.path]
    statistics = walk.statistics({slot.path: module})[slot.path]
    weight = refit_reader(matrix(module), None, statistics, slot.positions(kept)).weight
    cut_block(block, BlockPlan(channels=kept) if part == "mlp" else BlockPlan(query_heads=kept))
    if refit:
        matrix(module).copy_(weight)
    return dense, walk.outputs()


@pytest.mark.parametrize("part", ["mlp", "attention"])
def test_the_refit_reduces_the_blocks_output_error(part: str) -> None:
    errors = {}
    for refit in (False, True):
        dense, pruned = outputs_after(refit, part)
        errors[refit] = sum(float((a - b).square().sum()) for a, b in zip(dense, pruned, strict=True))
    assert 0 < errors[True] < 0.9 * errors[False]
