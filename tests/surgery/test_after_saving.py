"""A model that was saved before: that leaves its config's dtype as a string, from which some models cannot be built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ApertusConfig, ApertusForCausalLM

from hf_shrink import shrink


@pytest.mark.parametrize("what", ["quantize", "width"])
def test_it_is_compressed_as_before(what: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    config = ApertusConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=2)
    model: Any = ApertusForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    assert isinstance(model.config.dtype, str)
    steps = {
        "quantize": {"quantize": {"method": "rtn", "scheme": "W4A16", "group_size": 16}},
        "width": {"prune": {"what": "width", "method": "magnitude", "ratio": 0.2, "refit": False}},
    }
    done = shrink(model, {"portable": False, "steps": [steps[what]]}, progress=False)
    assert done.shrink_report.bytes_after < done.shrink_report.bytes_before
