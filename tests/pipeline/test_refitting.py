"""Cut and refitted blocks on whole tiny models: towards the dense model, stage by stage, with and without biases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance.cases_encoders import CASES as OTHERS
from tiny import QUICK_GPTQ, tiny_llama

from hf_shrink import shrink
from hf_shrink.calibration import walk as walking
from hf_shrink.pipeline import cutting
from hf_shrink.pruning.refit import refit_reader


def batches(count: int = 8, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 300, (6, 32), generator=draw)} for _ in range(count)]


def pruned(model: Any = None, data: Any = None, quantize: Any = None, portable: bool = True, **step: Any) -> Any:
    prune = {"what": "width", "method": "obs", "ratio": 0.3, **step}
    steps = [{"prune": prune}, *([{"quantize": quantize}] if quantize else [])]
    recipe = {"portable": portable, "steps": steps}
    return shrink(model or tiny_llama(), recipe, calibration=data or batches(), progress=False)


def hidden_error(model: Any) -> float:
    """Relative squared error of the last hidden states against the dense model, on data not calibrated on."""
    dense, lost, size = tiny_llama(), 0.0, 0.0
    with torch.no_grad():
        for batch in batches(4, seed=7):
            before, after = dense.model(**batch).last_hidden_state, model.model(**batch).last_hidden_state
            lost, size = lost + float((before - after).square().sum()), size + float(before.square().sum())
    return lost / size


def without_drift(weight: Any, bias: Any, statistics: Any, kept: Any) -> Any:
    statistics.drift = None
    return refit_reader(weight, bias, statistics, kept)


@pytest.mark.parametrize("units", ["mlp", "all"])
def test_the_refit_brings_outputs_nearer_to_the_dense_model(units: str, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = {"none": hidden_error(pruned(units=units, refit=False)), "dense": hidden_error(pruned(units=units))}
    monkeypatch.setattr(cutting, "refit_reader", without_drift)
    errors["running"] = hidden_error(pruned(units=units))
    assert errors["dense"] < 0.99 * errors["running"] < 0.95 * errors["none"], errors


def test_sliced_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The refit leaves zeros where units go: the model is the same before they are cut out."""
    sliced = pruned(portable=False)
    monkeypatch.setattr(cutting, "cut_block", lambda block, plan: None)
    masked = pruned(portable=False)
    assert masked.model.layers[0].mlp.down_proj.in_features == 80
    assert {layer.mlp.down_proj.in_features for layer in sliced.model.layers} != {80}
    with torch.no_grad():
        torch.testing.assert_close(sliced(**batches(1)[0]).logits, masked(**batches(1)[0]).logits, rtol=1e-4, atol=1e-5)


def test_the_same_bytes_twice() -> None:
    first, second = (pruned(portable=False).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_blocks_that_cannot_wait_are_refitted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    in_stages = hidden_error(pruned())
    monkeypatch.setattr(walking, "find_stages", lambda *args: None)
    at_once = hidden_error(pruned())
    assert in_stages < at_once < 0.95 * hidden_error(pruned(refit=False))


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_what_is_left_is_quantized_on_what_the_cut_blocks_put_out(method: str) -> None:
    quantize = {**(QUICK_GPTQ if method == "gptq" else {"method": method}), "scheme": "W8A16", "group_size": 16}
    model = pruned(quantize=quantize)
    assert hidden_error(model) < 1.1 * hidden_error(pruned())
    assert len(model.shrink_report.block_errors) == 4
    assert all(0 < error < 1 for error in model.shrink_report.block_errors.values())


@pytest.mark.parametrize("name", ["bert_classifier", "t5", "whisper"])
def test_matrices_with_biases_and_cross_attention(name: str) -> None:
    case = OTHERS[name]
    data = [case.inputs() for _ in range(3)]
    outputs = {}
    with torch.no_grad():
        outputs["dense"] = case.build()(**data[0]).logits
        for refit in (True, False):
            model = pruned(case.build(), data, portable=False, refit=refit)
            outputs[refit] = model(**data[0]).logits
    errors = {refit: float((outputs[refit] - outputs["dense"]).square().sum()) for refit in (True, False)}
    assert errors[True] < 0.9 * errors[False]
