"""Transforms together with what else a run may do: learning, tuning, 8-bit schemes, mixtures of experts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conformance import cases_mixtures
from conformance.cases_mixtures import MIXTURES
from tiny import QUICK_GPTQ, tiny_llama
from torch import Tensor, nn

from hf_shrink import shrink
from hf_shrink.architectures import bind
from hf_shrink.architectures.feeds import find_feeds


def data(batches: int = 3, seed: int = 7) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 300, (4, 24), generator=generator)} for _ in range(batches)]


def run(model: Any, *transforms: Any, calibration: Any = None, **step: Any) -> Any:
    body = {"method": "rtn", "scheme": "W4A16", "group_size": 16, "transforms": list(transforms), **step}
    body |= QUICK_GPTQ if body["method"] == "gptq" else {}
    asked = {"steps": [{"quantize": body}]}
    return shrink(copy.deepcopy(model), asked, calibration=calibration or data(), progress=False)


def error(model: nn.Module, dense: nn.Module) -> float:
    x = data(1, seed=99)[0]["input_ids"]
    with torch.no_grad():
        expected = dense(x).logits
        return float((model(x).logits - expected).square().mean() / expected.square().mean())


def with_outliers() -> Any:
    """Two channels come out of the norms 40 times larger."""
    model = tiny_llama(num_hidden_layers=2)
    with torch.no_grad():
        for block in model.model.layers:
            block.input_layernorm.weight[[3, 20]] *= 40
            block.post_attention_layernorm.weight[[3, 20]] *= 40
            attention, mlp = block.self_attn, block.mlp
            for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                reader.weight[:, [3, 20]] /= 10
    return model


EIGHT: dict[str, Any] = {"strategy": "channel", "group_size": None}


def test_learning_goes_on_from_scaled_weights() -> None:
    dense = with_outliers()
    start = run(dense, "rotate", "awq", method="gptq", scheme="W3A16")
    learned = run(dense, "rotate", "awq", method="learned", scheme="W3A16")
    first = [next(iter(model.shrink_report.block_errors.values())) for model in (start, learned)]
    assert first[1] < 0.95 * first[0]  # of the block that sees the same inputs in both
    assert error(learned, dense) < 1.1 * error(start, dense)
    assert any("scales of 8 inputs" in note for note in learned.shrink_report.notes)
    assert any("learned rounding took" in note for note in learned.shrink_report.notes)


def test_tuning_sees_the_dense_model_behind_rotated_weights() -> None:
    dense = with_outliers()
    wanted: dict[str, Any] = {"scheme": "W3A16", "calibration": data(6)}
    plain = run(dense, "rotate", "awq", **wanted)
    tuned = run(dense, "rotate", "awq", tune={"steps": 60}, **wanted)
    assert error(tuned, dense) < 0.95 * error(plain, dense)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_smoothing_makes_rounded_activations_better(method: str) -> None:
    dense = with_outliers()
    plain, smooth = (run(dense, *names, method=method, scheme="W8A8", **EIGHT) for names in ((), ("smooth",)))
    assert error(smooth, dense) < 0.7 * error(plain, dense)
    assert not any("leaves in 16 bits" in note for note in smooth.shrink_report.notes)


@pytest.mark.parametrize("scheme", ["W8A8", "FP8A16"])
def test_schemes_by_channel_go_with_every_transform(scheme: str) -> None:
    dense = tiny_llama(num_hidden_layers=2)
    plain, folded = (run(dense, *names, scheme=scheme, **EIGHT) for names in ((), ("rotate", "awq", "smooth")))
    assert 0 < error(folded, dense) < 2 * error(plain, dense)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_scales_its_attention_and_says_what_not(name: str) -> None:
    dense = MIXTURES[name]()
    model = run(dense, "rotate", "awq", scheme="W8A16", calibration=cases_mixtures.data())
    notes = model.shrink_report.notes
    assert any("inputs were folded" in note for note in notes)
    assert any("inputs of the experts were not scaled" in note for note in notes)
    assert any("was not rotated" in note for note in notes)
    assert error(model, dense) < 1e-2


def test_clipped_values_are_not_scaled() -> None:
    """Scales of values pass through an attention, but not through bounds."""
    dense = MIXTURES["olmoe"](clip_qkv=0.5)
    (stack,) = bind(dense).stacks
    found = find_feeds(stack.blocks[0], stack.spec, dense.config)
    assert not [feed for feed in found.found if "o_proj" in feed.readers[0]]
    assert ("output", "values are clipped, at bounds that are the same for every scale") in found.refused
    plain, folded = (
        run(dense, *names, scheme="W8A16", calibration=cases_mixtures.data()) for names in ((), ({"smooth": {}},))
    )
    assert error(folded, dense) < 2 * error(plain, dense)
    assert error(plain, MIXTURES["olmoe"]()) > 10 * error(plain, dense)  # the bounds matter
