"""Gradual pruning really trains every task head, and leaves a small model that does what the masked one did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training.trained import TASKS, outputs, trainer, width
from transformers import TrainerCallback

from hf_shrink import ShrinkCallback


class Masked(TrainerCallback):
    """Looks at the model just before it is cut, and at what was logged."""

    def __init__(self, make: Any) -> None:
        self.make = make

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.outputs, self.log = outputs(model, self.make), state.log_history


@pytest.mark.parametrize("task", TASKS)
def test_masked_then_cut_then_saved_and_loaded(task: str, tmp_path: Path) -> None:
    build, make = TASKS[task]
    model = build()
    before, start = sum(p.numel() for p in model.parameters()), outputs(model, make)
    masked = Masked(make)
    # Heads and channels of all stacks; the last steps are without changes.
    run = trainer(model, make, tmp_path, [masked, ShrinkCallback(width(0.3), start=0.1, end=0.7)])
    run.train()
    assert not torch.allclose(masked.outputs["loss"], start["loss"])  # it has learnt something
    found = outputs(model, make)
    for key, value in masked.outputs.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4)
    after = sum(p.numel() for p in model.parameters())
    logged = [entry for entry in masked.log if "shrink_sparsity" in entry]
    assert [entry["shrink_sparsity"] for entry in logged[:1]] == [0.0]
    assert logged[-1]["shrink_sparsity"] == pytest.approx(0.3, abs=0.1)
    assert logged[-1]["shrink_parameters"] == after < before
    run.save_model()
    loaded = type(model).from_pretrained(tmp_path)
    for key, value in outputs(loaded, make).items():
        torch.testing.assert_close(value, found[key])
    assert (tmp_path / "shrink.json").is_file() and "width" in (tmp_path / "README.md").read_text()
