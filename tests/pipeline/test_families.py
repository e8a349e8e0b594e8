"""The whole road on every family: prune and quantize with real statistics, save, load, same outputs.

Quantized without pruning: `transforms/test_transform_families.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import cases, cases_encoders
from tiny import QUICK_GPTQ
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_shrink import shrink
from hf_shrink.errors import RecipeError

GPTQ = {"quantize": {**QUICK_GPTQ, "scheme": "W8A16", "group_size": 16, "damping": 0.1}}
RTN = {"quantize": {"method": "rtn", "scheme": "W8A16", "group_size": 16}}
WIDTH = {"prune": {"what": "width", "method": "wanda", "ratio": 0.15}}
UNIFORM = {"prune": {"what": "width", "method": "magnitude", "ratio": 0.15, "refit": False}}

Built = tuple[Callable[[], PreTrainedModel], Callable[[], dict[str, Tensor]]]
EVERY: dict[str, Built] = {
    **{name: (case.build, case.inputs) for name, case in cases.CASES.items()},
    **{name: (case.build, case.inputs) for name, case in cases_encoders.CASES.items()},
}
every_family = pytest.mark.parametrize("name", EVERY)


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Every float tensor that the model returns, in one row."""
    with torch.no_grad():
        result = model(**inputs)
    found = [value for value in result.values() if isinstance(value, Tensor) and value.is_floating_point()]
    return torch.cat([value.flatten() for value in found])


def reload(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


@every_family
@pytest.mark.parametrize("portable", [True, False])
def test_pruned_refitted_and_quantized(name: str, portable: bool, tmp_path: Path) -> None:
    build, make_inputs = EVERY[name]
    dense, inputs = build(), make_inputs()
    conv = any(isinstance(module, Conv1D) for module in dense.modules())
    # What stock can say goes without statistics, with which the other row prunes, refits and rounds.
    steps = [WIDTH, GPTQ] if not portable else [UNIFORM] if conv else [UNIFORM, RTN]
    if portable and name == "bloom":  # no config key for its channels, and slopes that depend on the number of heads
        with pytest.raises(RecipeError, match="no units"):
            shrink(dense, {"steps": steps}, calibration=[inputs], progress=False)
        return
    model: Any = shrink(
        copy.deepcopy(dense), {"portable": portable, "steps": steps}, calibration=[inputs] * 2, progress=False
    )
    report = model.shrink_report
    removed = 1 - report.parameters_after / report.parameters_before
    assert removed > 0.01
    after = outputs(model, inputs)
    assert torch.isfinite(after).all()
    if portable:
        assert report.portable, report.not_portable_because
        assert not model.config.hf_shrink["shapes"]
    torch.testing.assert_close(outputs(reload(model, tmp_path), inputs), after, rtol=0, atol=0)
