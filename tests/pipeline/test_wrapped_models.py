"""Models inside of something else, or with adapters in them, are refused with words on how to get at the model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama

from hf_shrink import ArchitectureError, make_plan, shrink

IDS = torch.randint(3, 300, (4, 16), generator=torch.Generator().manual_seed(0))
RTN, GPTQ = ({"steps": [{"quantize": {"method": name, "group_size": 8}}]} for name in ("rtn", "gptq"))


def adapted() -> Any:
    adapters = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(tiny_llama(num_hidden_layers=2), adapters)


@pytest.mark.parametrize("recipe", [RTN, GPTQ])
@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: torch.compile(tiny_llama(num_hidden_layers=2)), "pass the model from before it, and compile the res"),
        (adapted, r"this model is one of PEFT \(PeftModelForCausalLM\).*peft_model\.merge_and_unload\(\)"),
        (lambda: adapted().get_base_model(), r"model\.layers\.0\.self_attn\.q_proj is one of PEFT.*merge_and_unload"),
    ],
)
def test_what_is_around_a_model_or_in_it_is_named(build: Any, match: str, recipe: Any) -> None:
    model = build()
    before = copy.deepcopy(model.state_dict())
    for act in (shrink, make_plan):
        with pytest.raises(ArchitectureError, match=match):
            act(model, recipe, calibration=[{"input_ids": IDS}], progress=False)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], old) for name, old in before.items())


def test_what_the_messages_say_helps() -> None:
    merged = adapted().merge_and_unload()
    shrink(merged, GPTQ, calibration=[{"input_ids": IDS}], progress=False)
    assert merged.shrink_report.bytes_after < merged.shrink_report.bytes_before
    compiled = torch.compile(tiny_llama(num_hidden_layers=2))
    shrink(compiled._orig_mod, GPTQ, calibration=[{"input_ids": IDS}], progress=False)
