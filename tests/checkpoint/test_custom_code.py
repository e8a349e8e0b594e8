"""A model whose class is code in its own folder: the code travels with what is left of the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_llama
from transformers import AutoModelForCausalLM

from hf_shrink import shrink

CODE = {
    "configuration_own.py": """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
""",
    "helping.py": "FACTOR = 2.0\n",
    "modeling_own.py": """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
from .helping import FACTOR

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = FACTOR * output.logits
        return output
""",
}


def test_the_code_travels_with_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = str(tmp_path / "cache")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
    source, output = tmp_path / "source", tmp_path / "smaller"
    tiny_llama().save_pretrained(source)
    for name, text in CODE.items():
        (source / name).write_text(text)
    config = json.loads((source / "config.json").read_text())
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": classes}
    (source / "config.json").write_text(json.dumps(config))

    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
    steps = [{"prune": {"what": "width", "ratio": 0.25, "method": "magnitude"}}]
    steps += [{"quantize": {"method": "rtn", "scheme": "W8A16", "group_size": 16}}]
    ids = torch.arange(3, 40)[None]
    small = shrink(model, {"steps": steps}, calibration=[{"input_ids": ids}], progress=False)
    small.save_pretrained(output)
    assert {path.name for path in output.glob("*.py")} == set(CODE)
    again = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, small(ids).logits, rtol=0, atol=1e-5)
        assert not torch.allclose(tiny_llama()(ids).logits, again(ids).logits)
