"""Blocks that lose units and bits in one pass, on tiny models."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conformance.cases import CASES
from tiny import QUICK_GPTQ, tiny_llama

from hf_shrink import shrink
from hf_shrink.calibration import walk
from hf_shrink.pipeline import narrowing, running
from hf_shrink.pipeline.running import Run

PRUNE = {"what": "width", "method": "obs", "ratio": 0.3}
GPTQ = {"method": "gptq", "scheme": "W3A16", "group_size": 16}


def batches(count: int = 8, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 300, (6, 32), generator=draw)} for _ in range(count)]


def shrunk(model: Any = None, data: Any = None, **quantize: Any) -> Any:
    recipe = {"portable": False, "steps": [{"prune": PRUNE}, {"quantize": {**GPTQ, **quantize}}]}
    return shrink(model or tiny_llama(), recipe, calibration=data or batches(), progress=False, optimize=False)


def hidden_error(model: Any, dense: Any = None) -> float:
    """Relative squared error of the last hidden states on data that was not calibrated on."""
    dense, lost, size = dense or tiny_llama(), 0.0, 0.0
    with torch.no_grad():
        for batch in batches(4, seed=7):
            before, after = (m.base_model(**batch).last_hidden_state for m in (dense, model))
            lost, size = lost + float((before - after).square().sum()), size + float(before.square().sum())
    return lost / size


def test_rounding_that_follows_the_dense_model_is_nearer_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = hidden_error(shrunk())
    monkeypatch.setattr(Run, "_cut_and_packed", lambda *args: False)
    assert at_once < 0.97 * hidden_error(shrunk())


def test_the_walk_saw_what_the_packed_block_puts_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until all batches are through, the block has its full size with zeros: the packed one computes the same."""
    real, seen = narrowing.cut_and_pack, []

    def noted(model: Any, block: Any, *args: Any, **settings: Any) -> Any:
        found = real(model, block, *args, **settings)
        seen.append((block.index, found[0].after))
        return found

    monkeypatch.setattr(running, "cut_and_pack", noted)
    monkeypatch.setattr(walk, "fast_precision", lambda *args, **settings: nullcontext())
    model, put_out = shrunk(), []
    assert len(seen) > 1
    handles = [
        layer.register_forward_hook(lambda *args: put_out.append(args[2][0] if isinstance(args[2], tuple) else args[2]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(**batches()[0])
    for handle in handles:
        handle.remove()
    for index, expected in seen:
        found = put_out[index]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_same_bytes_twice() -> None:
    first, second = (shrunk().state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "bloom"])
def test_matrices_that_hold_several_roles(name: str) -> None:
    """Fused and transposed ones lose rows of every role; in 8 bits next to nothing is lost beside the units."""
    both, pruned = CASES[name].build(), CASES[name].build()
    shrunk(both, **{**QUICK_GPTQ, "scheme": "W8A16", "group_size": 2})
    shrink(pruned, {"portable": False, "steps": [{"prune": PRUNE}]}, calibration=batches(), progress=False)
    assert both.shrink_record.plan.stacks == pruned.shrink_record.plan.stacks
    assert hidden_error(both, CASES[name].build()) < 1.05 * hidden_error(pruned, CASES[name].build())
