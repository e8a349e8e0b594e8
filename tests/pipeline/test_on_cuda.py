"""On a GPU: budgets, mixtures of experts, and the command line, which takes the accelerator by itself.

    python -m pytest tests/pipeline/test_on_cuda.py -n 0

Without a GPU all of it is skipped, and stays unmeasured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.cases_mixtures import MIXTURES, data
from tiny import TEXT, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from hf_shrink import shrink
from hf_shrink.cli import main
from hf_shrink.evaluation.size import stored_bytes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here: unmeasured")

SEARCH = {"group_size": 16, "effort": "fast", "generations": 1}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_SHRINK_CACHE", str(tmp_path / "cache"))


def batches() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.randint(3, 320, (4, 24))} for _ in range(4)]


@pytest.mark.parametrize("budget", [{"bytes": "25%"}, {"memory": "40%", "context": 256, "latency": "100%"}])
def test_a_budget(budget: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_llama().cuda()
    dense = tmp_path / "dense"
    model.save_pretrained(dense)
    asked = {"portable": False, "budget": budget, "search": SEARCH}
    shrink(model, asked, calibration=batches(), progress=False)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cuda"}
    model.save_pretrained(tmp_path / "small")
    takes, limits = (model.shrink_record.plan.search[key] for key in ("takes", "limits"))
    assert all(takes[name] <= limits[name] for name in limits)
    if "bytes" in budget:
        assert stored_bytes(tmp_path / "small") <= 0.25 * stored_bytes(dense)


STEPS: dict[str, dict[str, Any]] = {
    "gptq": {"steps": [{"quantize": {"method": "gptq", "scheme": "W4A16", "group_size": 8}}]},
    "width": {"steps": [{"prune": {"what": "width", "method": "obs", "ratio": 0.2}}]},
    "budget": {"portable": False, "budget": {"bytes": "40%"}, "search": {**SEARCH, "bits": [2, 4, 8], "group_size": 8}},
}


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("what", STEPS)
def test_mixtures_of_experts(what: str, name: str, tmp_path: Path) -> None:
    model: Any = MIXTURES[name]().cuda()
    shrink(model, STEPS[what], calibration=data(), progress=False)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cuda"}
    ids = data()[0]["input_ids"].cuda()
    with torch.no_grad():
        found = model(ids).logits
        again = model.cpu()(ids.cpu()).logits
    assert found.isfinite().all()
    if what == "width":  # what is multiplied in bfloat16 sends tokens to other experts
        torch.testing.assert_close(found.cpu(), again, rtol=1e-3, atol=1e-3)


def test_the_command_runs_there_and_stock_loads_what_it_writes(tmp_path: Path) -> None:
    source, text = tmp_path / "source", tmp_path / "text.txt"
    tiny_llama().save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    text.write_text(" ".join([TEXT] * 30))
    words = ["run", str(source), "--output", str(tmp_path / "out"), "--budget", "50%", "--calibration", str(text)]
    sets = ["--set", "search.group_size=16", "--set", "search.effort=fast", "--set", "search.generations=1"]
    assert main([*words, *sets, "--set", "calibration.samples=8", "--set", "calibration.length=16", "--quiet"]) == 0
    report = json.loads((tmp_path / "out" / "shrink.json").read_text())
    assert "cuda" in json.dumps(report)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").cuda()
    assert loaded(torch.arange(5, 15, device="cuda")[None]).logits.isfinite().all()
