"""One pass in stages: the same as stopping, solving and starting again before every stage."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import tiny_llama
from torch import nn

from hf_shrink.calibration import shelf
from hf_shrink.calibration.stages import find_stages
from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.calibration.walk import StackWalk
from hf_shrink.errors import CalibrationError

BLOCK = "model.layers.0."
STAGES = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]


def batches() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.randint(3, 300, (2, 12))} for _ in range(3)]


def walk_of(model: Any, data: list[dict[str, torch.Tensor]]) -> tuple[StackWalk, dict[str, nn.Module]]:
    walk = StackWalk(model, list(model.model.layers), data)
    names = [name for stage in STAGES for name in stage]
    return walk, {BLOCK + name: model.get_submodule(BLOCK + name) for name in names}


def halved(model: Any, path: str) -> None:
    """Put another module with half the weight where `path` is."""
    old = model.get_submodule(path)
    new = nn.Linear(old.in_features, old.out_features, bias=False)
    new.weight = nn.Parameter(old.weight.detach() / 2)
    model.set_submodule(path, new)


def test_stages_are_the_matrices_that_share_an_input_in_the_order_they_run() -> None:
    walk, matrices = walk_of(tiny_llama(), batches())
    found = find_stages(matrices, walk.call)
    assert found is not None
    assert [[path.removeprefix(BLOCK) for path in stage] for stage in found.stages] == STAGES


def test_one_pass_equals_solving_stage_by_stage_from_the_start() -> None:
    data = batches()
    slow, fast = tiny_llama(), tiny_llama()
    expected: dict[str, torch.Tensor] = {}
    for stage in STAGES:  # the reference: a new pass for every stage, through the matrices replaced so far
        walk, matrices = walk_of(slow, data)
        found = walk.statistics(matrices)
        for name in stage:
            expected[name] = found[BLOCK + name].hessian
            halved(slow, BLOCK + name)
    walk, _ = walk_of(slow, data)
    outputs = walk.outputs()

    walk, matrices = walk_of(fast, data)
    dense = copy.deepcopy(walk.outputs(1)[0])
    got: dict[str, torch.Tensor] = {}

    def solve(found: dict[str, InputStatistics]) -> None:
        for path, statistics in found.items():
            got[path.removeprefix(BLOCK)] = statistics.hessian
            halved(fast, path)

    passed = walk.advance_in_stages(matrices, solve, fast.get_submodule)
    assert passed is not None
    assert walk.position == 1
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=0)
    for ours, theirs in zip(walk.hidden, outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    torch.testing.assert_close(passed.before, dense, rtol=0, atol=0)
    torch.testing.assert_close(passed.after, outputs[0], rtol=0, atol=0)


def test_waiting_in_a_file_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    data = [{"input_ids": torch.randint(3, 300, (2, 64))} for _ in range(3)]
    hidden = []
    for room in (1 << 30, 0):
        monkeypatch.setattr(shelf, "SMALLEST", 1)
        monkeypatch.setattr(shelf, "IN_MEMORY", room)
        model = tiny_llama()
        walk, matrices = walk_of(model, data)
        walk.advance_in_stages(
            matrices, lambda found, model=model: [halved(model, path) for path in found], model.get_submodule
        )
        hidden.append(walk.hidden)
    for inside, outside in zip(*hidden, strict=True):
        torch.testing.assert_close(inside, outside, rtol=0, atol=0)


def test_when_nothing_comes_after_the_walk_stays() -> None:
    model = tiny_llama()
    walk, matrices = walk_of(model, batches())
    dense = walk.outputs(1)[0]
    passed = walk.advance_in_stages(matrices, lambda found: None, model.get_submodule, further=False)
    assert passed is not None
    torch.testing.assert_close(passed.after, dense, rtol=0, atol=0)
    assert walk.position == 0
    torch.testing.assert_close(walk.outputs(1)[0], dense, rtol=0, atol=0)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_failure_leaves_no_patch_and_the_walk_usable(stage: int) -> None:
    model = tiny_llama()
    walk, matrices = walk_of(model, batches())
    count = 0

    def solve(found: dict[str, InputStatistics]) -> None:
        nonlocal count
        count += 1
        if count > stage:
            raise CalibrationError("stop here")

    dense = walk.outputs()
    with pytest.raises(CalibrationError, match="stop here"):
        walk.advance_in_stages(matrices, solve, model.get_submodule)
    for ours, before in zip(walk.outputs(), dense, strict=True):
        torch.testing.assert_close(ours, before, rtol=0, atol=0)
    assert all("forward" not in vars(module) for module in matrices.values())


def test_a_failing_forward_is_raised_here() -> None:
    model = tiny_llama()
    walk, matrices = walk_of(model, batches())

    def solve(found: dict[str, InputStatistics]) -> None:
        if BLOCK + "self_attn.o_proj" in found:
            model.set_submodule(BLOCK + "self_attn.o_proj", nn.Linear(3, 3))

    with pytest.raises(RuntimeError, match="shape"):
        walk.advance_in_stages(matrices, solve, model.get_submodule)


def test_too_much_to_hold_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    walk, matrices = walk_of(model, batches())
    monkeypatch.setattr("hf_shrink.calibration.walk.MOST_WAITING", 1000)
    assert walk.advance_in_stages(matrices, lambda found: None, model.get_submodule) is None
    assert walk.position == 0


class Twice(nn.Module):
    """A block that uses one matrix twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear(self.linear(hidden))


def test_a_block_that_cannot_be_stopped_is_left_alone() -> None:
    block = Twice()
    assert find_stages({"linear": block.linear}, lambda _: block(torch.randn(2, 3, 8))) is None
    assert find_stages({"never": nn.Linear(8, 8)}, lambda _: block(torch.randn(2, 3, 8))) is None
