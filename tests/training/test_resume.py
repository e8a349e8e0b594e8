"""A training that stops anywhere and is resumed ends as one that never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_llama
from torch import Tensor
from training.trained import language, trainer, weights, width
from transformers import TrainerCallback

from hf_shrink import CheckpointError, ShrinkCallback, prune_weights

RECIPES: dict[str, Any] = {
    "width by movement": width(0.4, "movement"),
    "width by magnitude": width(0.4, "magnitude", units="mlp"),
    "2:4 by taylor": weights("taylor", pattern="2:4"),
    "half of the weights": weights(sparsity=0.5, granularity="global"),
    "zeros that are there": None,
}


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def train(recipe: Any, folder: Path, stop: int = 0, resume: bool = False) -> dict[str, Tensor]:
    model = tiny_llama(num_hidden_layers=2, attention_dropout=0.1)
    if recipe is None and not resume:
        prune_weights(model, sparsity=0.5)
    elif recipe is None:
        prune_weights(model, sparsity=0.1)  # other zeros; those of the checkpoint count
    callbacks = [ShrinkCallback(recipe, start=0.2, end=0.8, every=2), *([StopAt(stop)] if stop else [])]
    run = trainer(
        model, language, folder, callbacks, save_strategy="steps", save_steps=1, gradient_accumulation_steps=2
    )
    run.train(resume_from_checkpoint=resume or None)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


QUICK = ("2:4 by taylor", "width by movement")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in RECIPES])
def test_resumed_is_unbroken(name: str, tmp_path: Path) -> None:
    unbroken = train(RECIPES[name], tmp_path / "unbroken")
    for stop in (1, 4, 7):  # before, within and after the window
        train(RECIPES[name], tmp_path / str(stop), stop=stop)
        resumed = train(RECIPES[name], tmp_path / str(stop), resume=True)
        assert unbroken.keys() == resumed.keys()
        for key, value in unbroken.items():
            assert torch.equal(value, resumed[key]), (stop, key)


def test_a_checkpoint_without_or_with_another_recipe_is_refused(tmp_path: Path) -> None:
    train(RECIPES["2:4 by taylor"], tmp_path, stop=3)
    with pytest.raises(CheckpointError, match="another recipe"):
        train(RECIPES["half of the weights"], tmp_path, resume=True)
    (tmp_path / "checkpoint-3" / "hf_shrink_state.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        train(RECIPES["2:4 by taylor"], tmp_path, resume=True)
