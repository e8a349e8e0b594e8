"""Two processes on the CPU (gloo): DDP gives every process the same model, FSDP writes a cut copy."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_llama
from training.distillation_child import logged
from training.trained import language, outputs, quantize, trainer, width

from hf_shrink import LoadingConfig, ShrinkCallback
from hf_shrink.runtime.linear import CompressedLinear

CHILD = Path(__file__).with_name("process_child.py")


def run(kind: str, folder: Path, processes: int, recipe: dict[str, Any]) -> None:
    """`process_child.py`, once a process."""
    run_child(CHILD, [kind, str(folder), json.dumps(recipe)], processes)


def run_child(child: Path, words: list[str], processes: int) -> None:
    """A script under torch's environment variables, once a process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    paths = os.pathsep.join([str(CHILD.parents[2]), str(CHILD.parents[1])])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes), "PYTHONPATH": paths}
    children = [
        subprocess.Popen(
            [sys.executable, str(child), *words],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    said = [one.communicate(timeout=300)[1] for one in children]
    assert all(one.returncode == 0 for one in children), said[0][-3000:]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """One process with all of the rows in a batch."""
    model = tiny_llama(num_hidden_layers=2)
    trainer(model, language, tmp_path_factory.mktemp("alone"), [ShrinkCallback(width())]).train()
    return outputs(model, language)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2"])
def test_two_processes_are_one(kind: str, alone: dict[str, torch.Tensor], tmp_path: Path) -> None:
    run(kind, tmp_path, 2, width())
    masks = [load_file(tmp_path / f"state-{rank}.safetensors") for rank in range(2)]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
    loaded = type(tiny_llama()).from_pretrained(tmp_path / "saved")
    assert sum(p.numel() for p in loaded.parameters()) < sum(
        p.numel() for p in tiny_llama(num_hidden_layers=2).parameters()
    )
    torch.testing.assert_close(outputs(loaded, language)["logits"], alone["logits"], rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_two_processes_train_for_few_bits_as_one(tmp_path: Path) -> None:
    recipe = quantize("W4A16", symmetric=False)
    model = tiny_llama(num_hidden_layers=2)
    trainer(model, language, tmp_path / "alone", [ShrinkCallback(recipe)]).train()
    run("ddp", tmp_path, 2, recipe)
    loaded = type(model).from_pretrained(tmp_path / "saved", quantization_config=LoadingConfig(optimize=False))
    assert isinstance(loaded.model.layers[1].mlp.down_proj, CompressedLinear)
    torch.testing.assert_close(
        outputs(loaded, language)["logits"], outputs(model, language)["logits"], rtol=0, atol=2e-2
    )


@pytest.mark.slow
def test_two_processes_log_the_parts_of_a_distillation_as_one(tmp_path: Path) -> None:
    alone = logged(tmp_path, gradient_accumulation_steps=8)
    run_child(CHILD.with_name("distillation_child.py"), [str(tmp_path / "logged.json")], 2)
    both = json.loads((tmp_path / "logged.json").read_text())
    for name in ("loss", "distillation_loss", "task_loss"):
        assert both[name] == pytest.approx(alone[name], rel=1e-4)
    assert alone["loss"] == pytest.approx(alone["distillation_loss"] + 0.5 * alone["task_loss"], rel=1e-4)
