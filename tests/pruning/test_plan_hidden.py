"""To which width the residual stream is cut: near the ratio, in whole heads where the config wants it, and round."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance import cases_encoders
from conformance.cases import CASES
from conformance.cases_mixtures import MIXTURES
from tiny import tiny_llama
from transformers import MistralConfig, MistralForCausalLM

from hf_shrink.architectures import bind
from hf_shrink.errors import ArchitectureError, RecipeError
from hf_shrink.plan import HiddenPlan
from hf_shrink.pruning.base import HIDDEN
from hf_shrink.pruning.plan_hidden import Narrowing, plan_hidden
from hf_shrink.recipe import PruneStep


def planned(model: Any, ratio: float, **options: Any) -> Narrowing:
    step = PruneStep("hidden", "pca", ratio=ratio, options=options)
    return plan_hidden(model, bind(model), step, HIDDEN.build("pca", options))


@pytest.mark.parametrize(
    ("heads", "width", "ratio", "left"),
    [
        (6, 48, 0.25, 36),  # six heads: 36 and 42 are the next smaller ones
        (6, 48, 0.13, 42),
        (6, 48, 0.2, 36),  # neither is within 1%: the nearest
        (8, 256, 0.25, 192),
        (8, 1024, 0.2, 816),  # 819.2 within 1%: multiples of 8 from 809 to 829; 816 is one of 16
        (8, 1024, 0.25, 768),
    ],
)
def test_the_width_is_near_the_ratio_and_round(heads: int, width: int, ratio: float, left: int) -> None:
    with torch.device("meta"):
        model = tiny_llama(num_attention_heads=heads, num_key_value_heads=2, hidden_size=width, head_dim=8)
    before = model.config.to_dict()
    found = planned(model, ratio)
    assert found.plan == HiddenPlan("decoder", left, "pca", {}, True, False)
    missed = abs(1 - left / width - ratio) > 0.01
    assert any("asked to remove" in note for note in found.notes) == missed
    assert any("no multiple of 8" in note for note in found.notes) == (left % 8 > 0)
    assert model.config.to_dict() == before


def test_a_config_that_takes_any_width_gets_a_round_one() -> None:
    config = MistralConfig(
        hidden_size=576, num_attention_heads=9, num_key_value_heads=3, head_dim=64, num_hidden_layers=1, vocab_size=64
    )
    with torch.device("meta"):
        model = MistralForCausalLM(config)
    assert planned(model, 0.2).plan.width == 464  # 455 to 466 are within 1%
    assert planned(model, 0.0) == Narrowing(None, [])


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: CASES["gpt2"].build(), "LayerNorm subtracts the mean"),
        (lambda: CASES["gemma2"].build(), "norms weigh what attention and MLP add"),
        (lambda: cases_encoders.CASES["bert"].build(), "cannot be cut"),
        (lambda: MIXTURES["mixtral"](), "cannot be cut"),
        (lambda: tiny_llama().model, "no head"),
    ],
)
def test_where_it_cannot_be_folded_the_reason_is_given(build: Any, reason: str) -> None:
    with pytest.raises(ArchitectureError, match=reason):
        planned(build(), 0.2)


def test_more_than_there_is_cannot_go() -> None:
    with pytest.raises(RecipeError, match=r"nothing of the residual stream; at most 9[0-9]\.\d%"):
        planned(tiny_llama(), 0.99)
    with pytest.raises(RecipeError, match="untie must be true or false"):
        planned(tiny_llama(), 0.2, untie="yes")
