"""`recover` in two processes on the CPU, by DDP and by FSDP2, gives the model that one process gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_llama
from training.test_processes import run_child

from hf_shrink import Plan, prune_weights, shrink
from hf_shrink.plan import BlockPlan, StackPlan

CHILD = Path(__file__).with_name("recover_child.py")


def recovered(kind: str, method: str, folder: Path, processes: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What each process came to: its figures and the model's weights."""
    run_child(CHILD, [kind, method, str(folder)], processes)
    names = [folder / f"{kind}-{method}-{rank}" for rank in range(processes)]
    return [(json.loads(n.with_suffix(".json").read_text()), load_file(n.with_suffix(".safetensors"))) for n in names]


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return sum(float((one[name] - tensor).square().sum()) for name, tensor in other.items()) ** 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, and one whose blocks have lost channels, not all as many."""
    found = tmp_path_factory.mktemp("models")
    dense = tiny_llama(3, num_hidden_layers=3)
    dense.save_pretrained(found / "dense")
    blocks = {0: BlockPlan(channels=tuple(range(50))), 2: BlockPlan(channels=tuple(range(40)))}
    plan = Plan("llama", stacks={"decoder": StackPlan((0, 1, 2), blocks)}, refit=False)
    shrink(dense, plan, progress=False).save_pretrained(found / "small")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_processes_recover_as_one(method: str, folder: Path) -> None:
    ((alone, wanted),) = recovered("alone", method, folder, 1)
    assert alone["adopted"] and alone["steps"] == 12 and alone["after"] < 0.9 * alone["before"]
    small = load_file(folder / "small" / "model.safetensors")
    for kind in ("ddp", "fsdp2"):
        found = recovered(kind, method, folder, 2)
        assert found[0][0]["after"] == found[1][0]["after"] and found[0][0]["steps"] == 12
        assert found[0][0]["before"] == pytest.approx(alone["before"], rel=1e-5)
        assert found[0][0]["after"] == pytest.approx(alone["after"], rel=5e-3)
        assert all(torch.equal(tensor, found[1][1][name]) for name, tensor in found[0][1].items())
        # Adam makes whole steps of gradients that are rounding errors in bfloat16.
        assert distance(found[0][1], wanted) < 0.2 * distance(wanted, small)
        for figures, _ in found:
            assert len(figures["held"]) == (kind == "fsdp2")
            assert all(0.4 < held < 0.6 for held in figures["held"])  # each process trains its share


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "method", "words"),
    [("fsdp1", "lora", "fsdp_version 2"), ("fsdp2", "full", "zeros"), ("ddp", "scales", "")],
)
def test_what_several_processes_cannot_do_is_said_by_all(kind: str, method: str, words: str, tmp_path: Path) -> None:
    dense = tiny_llama(3, num_hidden_layers=2)
    dense.save_pretrained(tmp_path / "dense")
    if method == "scales":
        recipe = {"steps": [{"quantize": {"method": "rtn", "scheme": "W4A16", "group_size": 16}}]}
        shrink(dense, recipe, progress=False).save_pretrained(tmp_path / "small")
    else:
        prune_weights(dense.model.layers, sparsity=0.5)
        dense.save_pretrained(tmp_path / "small")
    run_child(CHILD, [kind, method, str(tmp_path)], 2)
    said = [(tmp_path / f"{kind}-{method}-{rank}.error").read_text() for rank in range(2)]
    assert said[0] == said[1] and words in said[0]
