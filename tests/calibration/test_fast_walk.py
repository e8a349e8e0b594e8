"""A walk whose blocks multiply in bfloat16: only the products are coarser, and autocast ends where the block does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conformance.cases import CASES
from tiny import tiny_llama
from torch import nn

from hf_shrink import shrink
from hf_shrink.calibration.precision import fast_products
from hf_shrink.calibration.statistics import InputStatistics
from hf_shrink.calibration.walk import StackWalk
from hf_shrink.ops import precision
from hf_shrink.pruning.predicting import Predictor

BLOCK = "model.layers.0."
NAMES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: True)  # any CPU can, if slowly


def walk_of(model: Any, fast: bool) -> tuple[StackWalk, dict[str, nn.Module]]:
    draw = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(3, 300, (2, 12), generator=draw)} for _ in range(3)]
    walk = StackWalk(model, list(model.model.layers), data, fast=fast)
    return walk, {BLOCK + name: model.get_submodule(BLOCK + name) for name in NAMES}


@pytest.mark.parametrize("staged", [True, False])
def test_statistics_are_those_of_float32_but_for_the_products(staged: bool) -> None:
    model = tiny_llama()
    found: dict[bool, dict[str, InputStatistics | None]] = {}
    hidden: dict[bool, list[torch.Tensor]] = {}
    for fast in (True, False):
        walk, matrices = walk_of(model, fast)
        found[fast] = {}

        def take(now: dict[str, InputStatistics | None], fast: bool = fast) -> None:
            assert not torch.is_autocast_enabled("cpu")
            found[fast].update(now)

        if staged:
            assert walk.advance_in_stages(matrices, take, model.get_submodule) is not None
        else:
            take(dict(walk.statistics(matrices)))
            walk.advance()
        hidden[fast] = walk.hidden
        assert not torch.is_autocast_enabled("cpu")
        assert {h.dtype for h in walk.hidden} == {torch.float32}
    for path, expected in found[False].items():
        coarse = found[True][path]
        assert coarse is not None and expected is not None and coarse.hessian.dtype == torch.float32
        error = (coarse.hessian - expected.hessian).norm() / expected.hessian.norm()
        assert error < 0.01
        assert (error == 0) == path.endswith("q_proj")  # in front of which nothing was multiplied
    assert 0 < float((hidden[True][0] - hidden[False][0]).norm() / hidden[False][0].norm()) < 0.01


@pytest.mark.parametrize("method", ["gptq", "learned"])
def test_four_bits_come_out_as_good(method: str) -> None:
    dense = tiny_llama(num_hidden_layers=2)
    ids = torch.randint(3, 300, (8, 16), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": part} for part in ids.split(4)]
    errors = []
    for scheme in ("W4A16", "W8A16"):
        step = {"method": method, "scheme": scheme, "group_size": 16}
        step |= {"steps": 4} if method == "learned" else {}
        model: Any = shrink(copy.deepcopy(dense), {"steps": [{"quantize": step}]}, calibration=batches, progress=False)
        with torch.no_grad():
            errors.append(float((model(ids).logits - dense(ids).logits).norm() / dense(ids).logits.norm()))
    assert errors[1] < 0.03 < errors[0] < 0.4


def test_a_whole_float16_model_stays_as_it_is_where_its_norms_take_nothing_else() -> None:
    ids = torch.randint(3, 300, (2, 12))
    for name, fast in (("opt", False), ("llama", True)):
        model = CASES[name].build().half()
        with torch.no_grad():
            expected = model(input_ids=ids).logits
        with fast_products(model):
            assert torch.is_autocast_enabled("cpu") is fast
        found = Predictor(model, fast=True).run({"input_ids": ids}).logits
        assert float((found - expected).norm() / expected.norm()) < (0.05 if fast else 1e-6)
