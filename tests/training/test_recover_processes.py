"""`recover` in two processes on the CPU, by DDP and by FSDP2, gives the model that one process gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from in_processes import join, said, start
from safetensors.torch import load_file
from tiny import TEXT, tiny_llama, tiny_tokenizer
from training.test_processes import run_child

from hf_shrink import Plan, prune_weights, shrink, shrink_checkpoint
from hf_shrink.cli import main
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
    [("fsdp1", "lora", "fsdp_version 2"), ("fsdp2", "full", "zeros"), ("ddp", "scales", "one process")],
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


@pytest.mark.slow
def test_the_command_recovers_in_two_processes(tmp_path: Path) -> None:
    tiny_llama(3, num_hidden_layers=3).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(TEXT * 4)
    recipe = {
        "calibration": {"samples": 8, "length": 24},
        "evaluation": {
            "data": str(tmp_path / "text.txt"),
            "samples": 4,
            "length": 24,
            "metrics": ["perplexity", "kl_divergence"],
        },
        "steps": [{"prune": {"what": "depth", "method": "block_influence", "blocks": 1}}],
    }
    small, out = tmp_path / "small", tmp_path / "out"
    shrink_checkpoint(tmp_path / "dense", small, recipe, calibration=str(tmp_path / "text.txt"), progress=False)
    asked = ["recover", str(small), "--output", str(out), "--data", str(tmp_path / "text.txt"), "--method", "full"]
    asked += ["--samples", "12", "--length", "24", "--learning-rate", "0.001"]
    log = tmp_path / "log"
    assert join(start(lambda rank: main([*asked, "--steps", "6"]), log)) == [0, 0], said(log, 0) + said(log, 1)
    others = [line for line in said(log, 1).splitlines() if "reducer.cpp" not in line]  # torch warns in all of them
    assert others == [] and "recovery (full, 6 steps" in said(log, 0)
    record = json.loads((out / "shrink.json").read_text())["report"]
    before = json.loads((small / "shrink.json").read_text())["report"]
    found, was = (said["evaluation"]["compressed"]["kl_divergence"]["value"] for said in (record, before))
    assert 0 < found != was  # measured anew
    loaded = type(tiny_llama()).from_pretrained(out)
    assert loaded.config.num_hidden_layers == 2 and (out / "README.md").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "log", "out", "small", "text.txt"]
    assert join(start(lambda rank: main([*asked, "--minutes", "1", "--overwrite"]), tmp_path / "again")) == [2, 2]
    lines = "".join(said(tmp_path / "again", rank) for rank in range(2))  # one of them says it
    assert lines.count("give steps instead of minutes") == 1 and "Traceback" not in lines
    assert (out / "shrink.json").is_file()
