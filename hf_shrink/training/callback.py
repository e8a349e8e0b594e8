"""`ShrinkCallback`: a recipe carried out by transformers' Trainer while it fine-tunes."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_shrink.checkpoint.record import ShrinkRecord
from hf_shrink.errors import CheckpointError, ShrinkError
from hf_shrink.pipeline.recipes import RecipeLike, read_recipe
from hf_shrink.report import ShrinkReport
from hf_shrink.training.card import keep_card
from hf_shrink.training.checks import check_one_device, check_sharded, check_trainer
from hf_shrink.training.finishing import SaveWhole, first_record, make_real
from hf_shrink.training.models import bare, is_peft, is_sharded, unwrapped
from hf_shrink.training.part import Part
from hf_shrink.training.parts import build_parts
from hf_shrink.training.schedule import Schedule, Window
from hf_shrink.training.state import Saved, check_same_training, checkpoint_folder, read_state, write_state

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.get_logger(__name__)
PREFIX = "shrink_"  # of what is logged


class ShrinkCallback(TrainerCallback):
    """Prunes a model, or trains it for few bits, while a `Trainer` (or one derived from it, as TRL's) fine-tunes it.

        half = {"steps": [{"prune": {"what": "width", "method": "movement", "ratio": 0.5}}]}
        trainer = Trainer(model, args, train_dataset=..., callbacks=[ShrinkCallback(half, end=0.6)])
        trainer.train()
        trainer.save_model()      # the small model

    Heads and channels are masked during training, more and more of them on a cubic schedule (Zhu & Gupta, arXiv
    1710.01878), and cut when it ends; single weights are zero from when they go. Nothing is made real if training stops
    before the schedule ends: resume it. A checkpoint of the training holds the uncut model, and its scores and masks in
    hf_shrink_state.safetensors; resuming needs no flag, and goes on with the schedule in steps as it began, also to
    another number of steps.

    Under a quantize step the model computes with its weights as they will be stored, from `start` on (with a prune
    step in front of it from `end` on), and learns their scales with them (LSQ, Esser et al., arXiv 1902.08153). What
    is packed in the end is exactly what was trained.

    Under FSDP the model in memory stays masked, and `trainer.save_model()` writes a cut copy. Adapters (PEFT) are
    merged when training ends.

    Args:
        recipe: a built-in name, the path of a YAML file, a mapping, or a `Recipe`, as for `shrink`; steps prune `width`
            or `weights`, or quantize to integers. Pruning methods that look at gradients (`taylor`, `fisher`,
            `movement`) take those of the training; the recipe's `calibration`, `evaluation` and `refit` are not used:
            what is kept is trained. None: nothing more is pruned, and the zeros that the model has are kept.
        start, end: the fractions of all optimizer steps between which masks change, and rounding begins.
        every: optimizer steps between two changes; None: about 50 changes.
        portable: in place of the recipe's (see `shrink`), which is false here where a file or mapping leaves it out.
        calibration, tokenizer, seed: as for `shrink`, for a quantize step whose method wants statistics, such as gptq:
            it then chooses where the scales start. Without them they start where they fit the weights best.

    Raises:
        RecipeError: the recipe cannot be carried out while training.
        ArchitectureError: (from `Trainer(...)`) the model does not allow a step.
    """

    def __init__(
        self,
        recipe: RecipeLike | None = None,
        *,
        start: float = 0.1,
        end: float = 0.7,
        every: int | None = None,
        portable: bool | None = None,
        calibration: Any = None,
        tokenizer: Any = None,
        seed: int = 0,
    ) -> None:
        self.recipe = None if recipe is None else read_recipe(recipe, portable=False)
        if self.recipe is not None and portable is not None:
            self.recipe = replace(self.recipe, portable=portable)
        self.schedule = Schedule(start, end, every)
        self._build = partial(build_parts, self.recipe, calibration, tokenizer, seed)
        self.parts: list[Part] = self._build()
        self._model: nn.Module | None = None  # the bare one that the parts are attached to
        self._window: Window | None = None
        self._steps: tuple[int, float] = (0, 0.0)  # optimizer steps and seconds, where this process began
        self._finished = False
        self._card_kept = False

    def attach(self, trainer: Trainer) -> ShrinkCallback:
        """Join a trainer that exists already, before it trains.

        Unlike `callbacks=[...]` this puts the callback before the reporting integrations, so that not only the progress
        bar and the log history but they too get its figures. And the model card that the trainer writes, as for
        `trainer.push_to_hub()`, keeps the compressed model's sections and metadata.

        Raises:
            ShrinkError: the trainer has made its optimizer already, and the recipe needs parameters of its own.
        """
        callbacks = trainer.callback_handler.callbacks
        known = self._model is not None and any(other is self for other in callbacks)
        callbacks[:] = [self, *(other for other in callbacks if other is not self)]
        keep_card(trainer)
        self._card_kept = True
        if not known:
            if trainer.optimizer is not None:
                self._refuse_late()
            assert trainer.model is not None
            self._attach(trainer.model)
        return self

    def _attach(self, model: nn.Module) -> None:
        if self._model is not None:  # an earlier one
            self.parts = self._build()
        self._model = bare(model)
        self._finished = False
        for part in self.parts:
            part.attach(self._model)

    def _refuse_late(self) -> None:
        if any(part.adds_parameters for part in self.parts):
            raise ShrinkError(
                "ShrinkCallback came after the optimizer, which would not train the parameters that it adds; give it "
                "to Trainer(callbacks=[...]), or call its attach(trainer) before trainer.train(); use model=... "
                "instead of model_init=..., and no optimizers=(...) made before"
            )

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        check_trainer(args, state, self)
        if kwargs.get("optimizer") is not None:
            self._refuse_late()
        self._attach(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_trainer(args, state, self)
        model = bare(kwargs["model"])
        sharded = is_sharded(kwargs["model"])
        if self._model is not model:  # added late, or made anew by `model_init`
            self._refuse_late()
            if sharded:
                raise ShrinkError("FSDP has spread the model already; give ShrinkCallback to Trainer(callbacks=[...])")
            self._attach(model)
            _recompile(args)  # what was compiled does not know the hooks
        if self._finished:
            raise ShrinkError(
                "this model has been finished, and the Trainer's optimizer still holds the weights that it had before; "
                "make a new Trainer to train it further"
            )
        if sharded:
            check_sharded(kwargs["model"])
        if any(part.adds_parameters for part in self.parts):
            check_one_device(args)
        saved = None
        if state.global_step:
            folder = checkpoint_folder(args, state)
            saved = self._saved(folder)
            check_same_training(folder, saved, state)
        self._window = self.schedule.window(state.max_steps) if saved is None else saved.window
        self._check_room(state.max_steps)
        for part in self.parts:
            part.begin(model, self._window)
        if saved is None:
            for part in self.parts:
                part.after_step(0)
        else:
            self._load(saved)
        self._steps = state.global_step, time.perf_counter()
        self._forget_best(state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._forget_best(state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer: Any = kwargs.get("optimizer")
        scaler = getattr(optimizer, "scaler", None)
        scale = float(scaler.get_scale()) if scaler is not None else 1.0
        if scaler is not None and not args.max_grad_norm:
            scaler.unscale_(optimizer.optimizer)  # which clipping has done otherwise
        for part in self.parts:
            part.before_optimizer_step(state.global_step + 1, scale)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for part in self.parts:
            part.after_step(state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if self._window is None or self._finished or "loss" not in (logs or {}):
            return
        figures = {PREFIX + name: value for part in self.parts for name, value in part.figures().items()}
        logs.update(figures)
        state.log_history[-1].update(figures)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._write(args, state)
        self._forget_best(state)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save and not self._finished:  # within a save, and what it wrote goes up before `on_save`
            self._write(args, state)
        if self._finished and not self._card_kept:
            logger.warning("the model card does not say how it was made smaller: call ShrinkCallback.attach(trainer)")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._window is not None
        settled = self._settled()
        if state.global_step < settled:
            logger.warning(
                f"training stopped at step {state.global_step}, before the schedule of ShrinkCallback ends (step "
                f"{settled}): nothing was made smaller. Resume from the last checkpoint and train to that step at "
                "least, or start anew with an earlier start and end."
            )
            return
        model, inner = bare(kwargs["model"]), unwrapped(kwargs["model"])
        if is_peft(inner) and args.load_best_model_at_end and state.best_model_checkpoint is not None:
            # The Trainer has loaded the best adapters, and they are all that it finds there.
            self._load(self._saved(Path(state.best_model_checkpoint)))
        record = self._record(model, state, args.seed)
        if is_sharded(kwargs["model"]):
            vars(model)["save_pretrained"] = SaveWhole(model, self.parts, lambda: self._record(model, state, args.seed))
        else:
            if is_peft(inner):
                inner.merge_and_unload(safe_merge=True)  # type: ignore[operator]  # rounds as training did
            make_real(model, self.parts, record)
            if inner is not model:  # the PEFT model, which the Trainer saves
                vars(inner).update(save_pretrained=model.save_pretrained, push_to_hub=model.push_to_hub)
            _recompile(args)
        self._finished = True

    def _write(self, args: TrainingArguments, state: TrainerState) -> None:
        folder = checkpoint_folder(args, state)
        if args.should_save and folder.is_dir():
            assert self._window is not None
            tensors = [part.tensors() for part in self.parts]
            write_state(folder, tensors, self._described(), self.schedule, self._window)

    def _saved(self, folder: Path) -> Saved:
        return read_state(folder, self._described(), self.schedule, len(self.parts))

    def _load(self, saved: Saved) -> None:
        for part, tensors in zip(self.parts, saved.tensors, strict=True):
            part.load(tensors)

    def _check_room(self, steps: int) -> None:
        """Raises CheckpointError where a training that is resumed would end before its schedule does."""
        if self._settled() > steps:
            raise CheckpointError(
                f"the training that is resumed began with a schedule that ends at step {self._settled()}, and this one "
                f"ends at step {steps}, so that nothing would be made smaller; train to step {self._settled()} at "
                "least (max_steps, num_train_epochs), or start anew in another output_dir"
            )

    def _settled(self) -> int:
        """The step from which on the model is what it will be, but for its weights."""
        assert self._window is not None
        return max(part.settled(self._window) for part in self.parts)

    def _forget_best(self, state: TrainerState) -> None:
        """No checkpoint from before the schedule's end is the best: it is another, larger model."""
        if state.global_step < self._settled():
            state.best_metric, state.best_global_step, state.best_model_checkpoint = None, None, None

    def _described(self) -> dict[str, Any]:
        return {} if self.recipe is None else self.recipe.to_dict()

    def _record(self, model: nn.Module, state: TrainerState, seed: int) -> ShrinkRecord:
        """What is known before the parts are made real."""
        assert self._window is not None
        began, clock = self._steps
        report = ShrinkReport(seed=seed, trained=True)
        report.seconds["total"] = time.perf_counter() - clock
        report.notes.append(
            f"made while training: {state.global_step} optimizer steps, changes between steps {self._window.start} and "
            f"{self._window.end}{f'; this process began at step {began}' if began else ''}"
        )
        return first_record(model, self._described(), report)


def _recompile(args: TrainingArguments) -> None:
    """Forget what `torch.compile` made of the model as it was."""
    if args.torch_compile:
        torch.compiler.reset()
