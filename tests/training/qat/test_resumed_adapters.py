"""Adapters beside weights that are trained for few bits, where a checkpoint has the adapters alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import QUICK_GPTQ, tiny_llama
from training.trained import Rows, language, quantize, trainer
from transformers import PreTrainedModel, Trainer, TrainerCallback

from hf_shrink import ShrinkCallback


class Interrupt(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


def adapted(folder: Path, recipe: Any, *others: TrainerCallback, data: Any = None, **settings: Any) -> Trainer:
    """A model with the same weights and adapters every time, that is rounded from step 2 of 8 on."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"])
    base = tiny_llama(num_hidden_layers=1)
    torch.manual_seed(1)
    callbacks = [ShrinkCallback(recipe, start=0.25, calibration=data), *others]
    model: Any = peft.get_peft_model(base, config)
    return trainer(model, language, folder, callbacks, save_strategy="steps", save_steps=1, **settings)


def base_of(run: Trainer) -> PreTrainedModel:
    model: Any = run.model
    found: PreTrainedModel = model.get_base_model()
    return found


def test_weights_that_a_calibrated_start_moved_are_those_of_an_unbroken_run(tmp_path: Path) -> None:
    data = [{"input_ids": torch.stack([Rows(language)[i]["input_ids"] for i in range(8)])}]
    recipe = quantize(**QUICK_GPTQ)
    unbroken = adapted(tmp_path / "unbroken", recipe, data=data)
    unbroken.train()
    with pytest.raises(KeyboardInterrupt):
        adapted(tmp_path / "broken", recipe, Interrupt(), data=data).train()
    for checkpoint in (5, 7):  # as the process wrote it that made the start, and as one that was resumed
        resumed = adapted(tmp_path / "broken", recipe, data=data)
        resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / f"checkpoint-{checkpoint}"))
        found = base_of(resumed).state_dict()
        for name, tensor in base_of(unbroken).state_dict().items():
            assert torch.equal(tensor, found[name]), (checkpoint, name)


class FourthIsBest(TrainerCallback):
    """Keeps what was measured, and lets the Trainer believe that step 4 was the best."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.losses[state.global_step] = metrics["eval_loss"]
        metrics["eval_loss"] = abs(state.global_step - 4.0)


def test_the_best_adapters_are_packed_with_their_own_scales(tmp_path: Path) -> None:
    best = FourthIsBest()
    settings = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "learning_rate": 0.03}
    run = adapted(tmp_path, quantize(), best, **settings)
    run.train()
    assert run.state.best_global_step == 4
    run.remove_callback(best)
    assert run.evaluate()["eval_loss"] == pytest.approx(best.losses[4], rel=1e-5)
    assert best.losses[4] != pytest.approx(best.losses[8], rel=1e-2)
