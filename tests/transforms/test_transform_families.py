"""Statistics, transforms and GPTQ on every family: what can be folded is, the rest is said, files give the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import cases, cases_encoders
from conformance.references import outputs
from tiny import QUICK_GPTQ

from hf_shrink import shrink
from hf_shrink.architectures import bind
from hf_shrink.architectures.feeds import find_feeds
from hf_shrink.runtime.linear import CompressedLinear

STEP = {**QUICK_GPTQ, "scheme": "W8A16", "group_size": 16, "transforms": ["rotate", {"awq": {"grid": 3}}]}
EVERY: dict[str, Any] = {**cases.CASES, **cases_encoders.CASES}


@pytest.mark.parametrize("name", EVERY)
def test_every_family(name: str, tmp_path: Path) -> None:
    dense, inputs = EVERY[name].build(), EVERY[name].inputs()
    asked = {"portable": False, "steps": [{"quantize": STEP}]}
    model: Any = shrink(copy.deepcopy(dense), asked, calibration=[inputs] * 2, progress=False)
    after = outputs(model, inputs)
    for a, b in zip(after, outputs(dense, inputs), strict=True):
        assert 0 < float((a - b).norm() / b.norm()) < 0.5  # two random models make much of 8 bits' rounding
    blocks = [block for stack in bind(dense).stacks for block in stack.blocks]
    for block in blocks:
        for path in block.roles:
            assert isinstance(model.get_submodule(path), CompressedLinear), path
    found = sum(len(find_feeds(b, s.spec, dense.config).found) for s in bind(dense).stacks for b in s.blocks)
    notes = model.shrink_report.notes
    assert f"scales of {found} inputs were folded into the weights" in notes
    assert sum("residual stream" in note for note in notes) == len(bind(dense).stacks)
    assert len(model.shrink_report.block_errors) == len(blocks)
    assert max(model.shrink_report.block_errors.values()) < 2e-3
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert all(torch.equal(a, b) for a, b in zip(outputs(loaded, inputs), after, strict=True))
