"""A model whose class is code in its own folder: the code travels with what is left of the weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tiny import tiny_llama

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


SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM
from hf_shrink import shrink

source, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
steps = [{"prune": {"what": "width", "ratio": 0.25, "method": "magnitude"}}]
steps += [{"quantize": {"method": "rtn", "scheme": "W8A16", "group_size": 16}}]
ids = torch.arange(3, 40)[None]
small = shrink(model, {"steps": steps}, calibration=[{"input_ids": ids}], progress=False)
small.save_pretrained(output)
again = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
with torch.no_grad():
    torch.testing.assert_close(again(ids).logits, small(ids).logits, rtol=0, atol=1e-5)
    again.forward = super(type(again), again).forward  # without what the code does
    torch.testing.assert_close(2 * again(ids).logits, small(ids).logits, rtol=0, atol=1e-5)
"""


def test_the_code_travels_with_the_weights(tmp_path: Path) -> None:
    """In a process of its own: Python keeps the place of such code for as long as it runs."""
    source, output = tmp_path / "source", tmp_path / "smaller"
    tiny_llama().save_pretrained(source)
    for name, text in CODE.items():
        (source / name).write_text(text)
    config = json.loads((source / "config.json").read_text())
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": classes}
    (source / "config.json").write_text(json.dumps(config))
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", SCRIPT, str(source), str(output)], env=environment, check=True)
    assert {path.name for path in output.glob("*.py")} == set(CODE)
