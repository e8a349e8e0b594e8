"""Experts of a mixture, which lose as many channels: one curve from those of each."""

from __future__ import annotations

import torch

from hf_shrink.ops.removal import RemovalCurve
from hf_shrink.pruning.members import joined
from hf_shrink.pruning.parts import Part, expert_ways


def test_a_round_takes_the_next_channel_of_each() -> None:
    draw = torch.Generator().manual_seed(0)
    experts, each = 3, 16
    curves = []
    for _ in range(experts):
        alone = torch.rand(each, generator=draw, dtype=torch.float64)
        order = torch.randperm(each, generator=draw)
        losses = torch.rand(each, generator=draw, dtype=torch.float64).cumsum(0)
        curves.append(RemovalCurve(order, losses, alone))
    found = joined(curves)
    assert sorted(found.order.tolist()) == list(range(experts * each))
    assert bool((found.losses.diff() >= 0).all())
    for number, curve in enumerate(curves):
        own = [unit - number * each for unit in found.order.tolist() if unit // each == number]
        assert own == curve.order.tolist()
        assert torch.equal(found.alone[number * each : (number + 1) * each], curve.alone)
    (way,) = expert_ways(found, experts, parameters=21)
    assert list(way.counts) == [0, 8] and way.parameters == 21  # what is left can be multiplied
    for count in (1, 5, each):
        lost = sum(float(curve.losses[count - 1]) for curve in curves)
        assert abs(float(way.losses[count - 1]) - lost) < 1e-12
    kept = Part(("decoder", 0), "experts", experts * each, (way,)).kept(0, 8)
    expected = [n * each + u for n, curve in enumerate(curves) for u in sorted(curve.order[8:].tolist())]
    assert list(kept) == expected
