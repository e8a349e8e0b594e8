"""A training that stops anywhere and is resumed ends as one that never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import tiny_llama
from torch import Tensor
from training.trained import language, quantize, trainer, weights, width
from transformers import Trainer, TrainerCallback

from hf_shrink import CheckpointError, ShrinkCallback, ShrinkError, prune_weights

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


@pytest.mark.parametrize("amount", [{"threshold": 10.0}, {"sparsity": 1.0}], ids=str)
def test_emptied_matrices_stay_empty_resumed_or_not(amount: dict[str, float], tmp_path: Path) -> None:
    unbroken = train(weights(**amount), tmp_path / "unbroken")
    train(weights(**amount), tmp_path / "stopped", stop=7)  # the window has ended
    for found in (unbroken, train(weights(**amount), tmp_path / "stopped", resume=True)):
        assert all(not tensor.any() for name, tensor in found.items() if "_proj" in name)


def test_a_checkpoint_without_or_with_another_recipe_is_refused(tmp_path: Path) -> None:
    train(RECIPES["2:4 by taylor"], tmp_path, stop=3)
    with pytest.raises(CheckpointError, match="another recipe"):
        train(RECIPES["half of the weights"], tmp_path, resume=True)
    (tmp_path / "checkpoint-3" / "hf_shrink_state.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        train(RECIPES["2:4 by taylor"], tmp_path, resume=True)


def resumed(recipe: Any, folder: Path, steps: int, **schedule: Any) -> tuple[Any, Any]:
    """A training of 8 steps that was `stopped`, resumed for another number of steps."""
    chosen = {"start": 0.1, "end": 0.5} | schedule
    callbacks = [ShrinkCallback(recipe, **chosen)]
    run = trainer(tiny_llama(num_hidden_layers=1), language, folder, callbacks, max_steps=steps)
    run.train(resume_from_checkpoint=True)
    return run.model, [entry for entry in run.state.log_history if "loss" in entry]


def stopped(recipe: Any, folder: Path, stop: int) -> None:
    callbacks = [ShrinkCallback(recipe, start=0.1, end=0.5), StopAt(stop)]
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": stop}
    trainer(tiny_llama(num_hidden_layers=1), language, folder, callbacks, **settings).train()


@pytest.mark.parametrize("name", ["2:4 by taylor", "width by magnitude", "few bits"])
def test_resumed_for_other_steps_it_goes_on_with_the_schedule_as_it_began(name: str, tmp_path: Path) -> None:
    recipe = quantize() if name == "few bits" else RECIPES[name]
    stopped(recipe, tmp_path, stop=2)  # of steps 1 to 4
    for steps in (5, 20):
        model, logged = resumed(recipe, tmp_path, steps)
        assert any("between steps 1 and 4" in note for note in model.shrink_report.notes)
        figures = [(e["step"], e.get("shrink_sparsity", e.get("shrink_effective_bits"))) for e in logged]
        assert all(figure == figures[-1][1] for step, figure in figures if step >= 4)
        if name == "few bits":
            assert len(model.model.layers[0].mlp.up_proj.weight.unique()) > 16
        else:
            assert figures[-1][1] == pytest.approx(0.5 if "taylor" in name else 0.4, abs=0.02)


def test_another_schedule_or_too_few_steps_are_refused(tmp_path: Path) -> None:
    recipe = RECIPES["width by magnitude"]
    stopped(recipe, tmp_path, stop=2)
    with pytest.raises(CheckpointError, match=r"trained with start=0.1, end=0.5 and every=None, not .*every=3"):
        resumed(recipe, tmp_path, 8, end=0.7, every=3)
    with pytest.raises(CheckpointError, match="ends at step 4, and this one ends at step 3"):
        resumed(recipe, tmp_path, 3)


class NotFinite(TrainerCallback):
    """Logs what JSON has no word for, and a number with all its digits."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.log_history[-1].update({"nan": float("nan"), "infinite": -float("inf"), "third": 1 / 3})


def test_the_state_is_that_of_the_checkpoint_that_is_resumed(tmp_path: Path) -> None:
    def run(folder: Path, **settings: Any) -> Trainer:
        callbacks = [ShrinkCallback(RECIPES["width by magnitude"]), NotFinite(), StopAt(3)]
        settings = {"save_strategy": "steps", "save_steps": 3, **settings}
        return trainer(tiny_llama(num_hidden_layers=1), language, folder, callbacks, **settings)

    run(tmp_path / "one").train()
    run(tmp_path / "other", learning_rate=0.1).train()
    with pytest.raises(CheckpointError, match=r"another training .* set output_dir"):
        run(tmp_path / "other").train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-3"))
    (tmp_path / "one").rename(tmp_path / "moved")
    resumed = run(tmp_path / "moved")
    resumed.train(resume_from_checkpoint=True)
    assert hasattr(resumed.model, "shrink_record")


class Says(TrainerCallback):
    """Logs when training begins."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.log({"trainable": 1.0})


def test_what_a_callback_in_front_logs_at_the_beginning_is_no_other_training(tmp_path: Path) -> None:
    def run(*more: TrainerCallback) -> Trainer:
        says = Says()
        callbacks = [says, ShrinkCallback(RECIPES["width by magnitude"]), *more]
        settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
        says.run = trainer(tiny_llama(num_hidden_layers=1), language, tmp_path, callbacks, **settings)
        return says.run

    run(StopAt(2)).train()
    going_on = run()
    going_on.train(resume_from_checkpoint=True)
    assert sum("trainable" in entry for entry in going_on.state.log_history) == 2
    assert hasattr(going_on.model, "shrink_record")


def test_a_state_from_before_entries_were_counted_is_resumed(tmp_path: Path) -> None:
    stopped(RECIPES["width by magnitude"], tmp_path, stop=2)
    path = tmp_path / "checkpoint-2" / "hf_shrink_state.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    del metadata["entries"]
    save_file(tensors, path, metadata=metadata)
    model, _ = resumed(RECIPES["width by magnitude"], tmp_path, 8)
    assert hasattr(model, "shrink_record")


def test_a_damaged_state_is_refused_with_the_remedy(tmp_path: Path) -> None:
    stopped(RECIPES["width by magnitude"], tmp_path, stop=2)
    path = tmp_path / "checkpoint-2" / "hf_shrink_state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="another checkpoint"):
        resumed(RECIPES["width by magnitude"], tmp_path, 8)


def test_scales_that_never_began_are_not_packed(tmp_path: Path) -> None:
    callback = ShrinkCallback(quantize(), start=0.0)
    run = trainer(tiny_llama(num_hidden_layers=1), language, tmp_path, [callback], max_steps=1)
    callback.parts[0].after_step = lambda step: None  # type: ignore[method-assign]
    with pytest.raises(ShrinkError, match="rounding was to begin at step 0"):
        run.train()


class InterruptAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_scales_of_a_training_that_was_given_up_do_not_begin_the_next(tmp_path: Path) -> None:
    def run(*others: TrainerCallback) -> Trainer:
        callbacks = [ShrinkCallback(quantize(), start=0.5), *others]
        settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
        return trainer(tiny_llama(num_hidden_layers=1), language, tmp_path, callbacks, **settings)

    interrupt = InterruptAt(5)
    first = run(interrupt)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    interrupt.step = 3
    with pytest.raises(KeyboardInterrupt):
        first.train()  # the same model, from the start
    resumed = run()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    bits = {e["step"]: e["shrink_effective_bits"] for e in resumed.state.log_history if "shrink_effective_bits" in e}
    assert bits[3] == 32 and bits[4] < 32
