"""Models of which stock builds or makes something else once weights are packed: marked, and right in our own loader."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_llama
from torch import nn
from transformers import (
    HrmTextConfig,
    HrmTextForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    RadioConfig,
    RadioModel,
)

from hf_shrink import shrink
from hf_shrink.architectures.probe import build, difference, find_inputs, outputs
from hf_shrink.architectures.tiny import rebuilt, shrunken
from hf_shrink.checkpoint.exchanged import exchange_reasons

CASES = {
    "experts": (Llama4ForCausalLM, Llama4TextConfig(num_hidden_layers=2), "puts another module there"),
    "fused": (RadioModel, RadioConfig(num_hidden_layers=2), "makes its weight from others"),
}


def test_what_stock_splits_is_not_portable_beside_anything_packed() -> None:
    model = build(HrmTextForCausalLM, rebuilt(shrunken(HrmTextConfig())))
    down = next(path for path, _ in model.named_modules() if path.endswith("mlp.down_proj"))
    assert exchange_reasons(model, []) == []
    (reason,) = exchange_reasons(model, [down])  # which is itself made of nothing else
    assert reason.startswith("mlp.gate_up_proj.weight: stock splits this weight")


@pytest.mark.parametrize("name", CASES)
def test_what_stock_exchanges_is_not_portable(name: str, tmp_path: Path) -> None:
    kind, config, reason = CASES[name]
    model = build(kind, rebuilt(shrunken(config)))
    inputs = find_inputs(model)
    shrink(model, {"portable": False, "steps": [{"quantize": {"method": "rtn", "scheme": "W4A16"}}]}, progress=False)
    assert any(reason in why for why in model.shrink_report.not_portable_because)
    model.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path).eval()
    assert difference(outputs(loaded, inputs), outputs(model, inputs)) < 1e-5


def test_without_packed_weights_and_in_other_models_nothing_is_exchanged() -> None:
    kind, config, _ = CASES["experts"]
    assert exchange_reasons(build(kind, rebuilt(shrunken(config))), []) == []
    llama = tiny_llama()
    assert exchange_reasons(llama, [path for path, m in llama.named_modules() if isinstance(m, nn.Linear)]) == []
