"""Every family that is quantized in memory is streamed too, to the same bytes, however its checkpoint names things."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import cases, cases_encoders, cases_mixtures
from transformers import PreTrainedModel

from hf_shrink import shrink, shrink_checkpoint
from hf_shrink.checkpoint.source import load_source_model, open_source
from hf_shrink.pipeline import checkpointing

QUICK = ("mixtral", "vit")  # tensors that are merged, and renamed, while transformers loads
FAMILIES: dict[str, Any] = {
    **cases.CASES,
    **cases_encoders.CASES,
    **{name: cases.Case(build) for name, build in cases_mixtures.MIXTURES.items()},
}
assert set(QUICK) <= set(FAMILIES)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in FAMILIES])
def test_the_same_bytes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointing, "write_report", lambda *given, **named: None)
    case = FAMILIES[name]
    model: PreTrainedModel = case.build()
    model.save_pretrained(tmp_path / "source")
    step = {"scheme": "W4A16", "method": "gptq", "group_size": 8, "starved_experts": "rtn"}
    recipe = {"portable": False, "steps": [{"quantize": step}], "evaluation": {"metrics": []}}
    data = [{k: v for k, v in case.inputs().items() if isinstance(v, torch.Tensor)} for _ in range(2)]
    given = {"calibration": data, "progress": False}
    shrink(load_source_model(open_source(tmp_path / "source")), recipe, **given).save_pretrained(tmp_path / "memory")
    shrink_checkpoint(tmp_path / "source", tmp_path / "out", recipe, max_memory=0, **given)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "memory" / file).read_bytes(), file
