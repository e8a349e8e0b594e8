"""Models whose weights accelerate brings when a module runs are shrunk as if they were simply there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from tiny import tiny_llama

from hf_shrink import make_plan, shrink

IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(3))
PLACES = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
PLACES |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk", "model.layers.3": "cpu"}
WAYS: dict[str, Callable[[Any, Path], Any]] = {
    "cpu": lambda model, folder: cpu_offload(model),
    "disk": lambda model, folder: disk_offload(model, folder / "offloaded"),
    "map": lambda model, folder: dispatch_model(model, PLACES, offload_dir=folder / "offloaded"),
}
RECIPES: dict[str, dict[str, Any]] = {
    "gptq": {"steps": [{"quantize": {"scheme": "W4A16", "method": "gptq", "group_size": 16}}]},
    "depth and width": {
        "portable": False,
        "steps": [
            {"prune": {"what": "depth", "method": "block_influence", "blocks": 1}},
            {"prune": {"what": "width", "method": "wanda", "ratio": 0.2}},
        ],
    },
}


def batches() -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 300, (2, 24), generator=draw)} for _ in range(4)]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return {
        name: shrink(tiny_llama(), recipe, calibration=batches(), progress=False, optimize=False)
        for name, recipe in RECIPES.items()
    }


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("way", WAYS)
def test_they_come_out_as_others_do_and_are_dispatched_again(
    way: str, recipe: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    model = WAYS[way](tiny_llama(), tmp_path)
    before = meta_weights(model)
    assert before
    plan = make_plan(model, RECIPES[recipe], calibration=batches(), progress=False)
    assert meta_weights(model) == before and torch.equal(logits(model), logits(tiny_llama()))
    assert shrink(model, plan if recipe == "gptq" else RECIPES[recipe], calibration=batches(), progress=False) is model
    assert torch.equal(logits(model), logits(expected[recipe]))
    gone = meta_weights(model)
    assert all(path.startswith(("model.layers.1.", "model.layers.2.")) for path in gone) == (way == "map")
    assert any("down_proj.weight" in path for path in gone)
    model.save_pretrained(tmp_path / "saved")
    expected[recipe].save_pretrained(tmp_path / "expected")
    names = [path.name for path in (tmp_path / "expected").glob("*.safetensors")]
    assert names and all(
        (tmp_path / "saved" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes() for name in names
    )


def meta_weights(model: Any) -> list[str]:
    """The paths of what is only there while its module runs."""
    return sorted(name for name, tensor in model.state_dict().items() if tensor.device.type == "meta")


def test_a_tie_survives(tmp_path: Path) -> None:
    dense = tiny_llama(tie_word_embeddings=True)
    recipe = {"steps": [{"quantize": {"scheme": "W4A16", "method": "rtn", "group_size": 16}}]}
    model = shrink(disk_offload(copy.deepcopy(dense), tmp_path / "offloaded"), recipe, progress=False)
    assert torch.equal(logits(model), logits(shrink(dense, recipe, progress=False, optimize=False)))
    assert model.shrink_report.parameters_after == dense.shrink_report.parameters_after
