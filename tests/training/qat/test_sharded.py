"""A quantize step on weights that FSDP has spread over two processes on the CPU (gloo)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training.test_processes import run_child

CHILD = Path(__file__).with_name("sharded_child.py")


@pytest.mark.slow
def test_fsdp2_trains_what_one_process_trains(tmp_path: Path) -> None:
    run_child(CHILD, ["alone", str(tmp_path)], 1)
    run_child(CHILD, ["fsdp2", str(tmp_path)], 2)
    alone, sharded = (load_file(tmp_path / f"{kind}.safetensors") for kind in ("alone", "fsdp2"))
    for name, tensor in alone.items():
        torch.testing.assert_close(sharded[name], tensor, rtol=1e-4, atol=1e-4)
