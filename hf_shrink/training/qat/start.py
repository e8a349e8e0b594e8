"""Where training for few bits starts: grids that a quantization method finds for the weights as they are then."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_shrink.architectures.adapters import without_adapters
from hf_shrink.ops.quantized import QuantizedWeight
from hf_shrink.pipeline.applying import apply_plan
from hf_shrink.pipeline.packing import Task, solve_alone
from hf_shrink.pipeline.planning import find_binding
from hf_shrink.pipeline.recipes import plan_method
from hf_shrink.pipeline.shrinking import evaluating
from hf_shrink.plan import Plan
from hf_shrink.progress import quiet
from hf_shrink.quantization.base import ModelMethod, QuantizationMethod
from hf_shrink.report import ShrinkReport
from hf_shrink.runtime.packed import PackedModule
from hf_shrink.scheme import Scheme
from hf_shrink.training.qat.adapters import adapted_layers
from hf_shrink.training.qat.forward import detach

DATA_FREE = "rtn"


def solving_method(plan: Plan) -> QuantizationMethod:
    """The plan's method, which is one of those that solve weights."""
    method = plan_method(plan)
    assert method is not None and not isinstance(method, ModelMethod)
    return method


def without_data(plan: Plan) -> Plan:
    """The plan with a method that needs no data: its own, or rounding to nearest with its search of scales."""
    if not solving_method(plan).needs_statistics:
        return plan
    return replace(plan, method=DATA_FREE, options={}, effort=None)


def start_of(plan: Plan, scheme: Scheme, weight: Tensor) -> QuantizedWeight:
    """What the plan's method makes of a weight (out_features, in_features) without data."""
    holder = nn.Linear(1, 1, bias=False, device="meta")
    holder.weight = nn.Parameter(weight, requires_grad=False)
    return solve_alone(solving_method(plan), Task("weight", holder, scheme, None, weight.dtype))


def start_on_data(
    model: nn.Module, plan: Plan, batches: Sequence[Mapping[str, Any]], seed: int
) -> dict[str, QuantizedWeight]:
    """What `shrink` makes of each weight, by path: a copy of the model is quantized block by block.

    Args:
        model: with quantizers, and perhaps adapters, which are merged in the copy. It stays as it is.
        batches: model inputs to calibrate on.
    """
    twin = copy.deepcopy(model)
    for layer in adapted_layers(twin).values():
        layer.merge(safe_merge=True)  # type: ignore[operator]  # rounds as training does
    with without_adapters(twin), evaluating(twin):
        for path in plan.schemes:
            detach(twin.get_submodule(path))
        apply_plan(twin, find_binding(twin), plan, solving_method(plan), batches, ShrinkReport(), quiet, seed)
        packed = {path: twin.get_submodule(path) for path in plan.schemes}
    found = {}
    with torch.no_grad():
        for path, module in packed.items():
            assert isinstance(module, PackedModule)
            found[path] = QuantizedWeight(*module.unpacked(), 0.0)
    return found
