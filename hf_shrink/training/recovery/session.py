"""The training of a recovery: DistillationTrainer on prepared batches, for so many steps or minutes."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_shrink.errors import CalibrationError
from hf_shrink.modes import modes_kept
from hf_shrink.ops.precision import multiplies_bfloat16
from hf_shrink.progress import ProgressCallback
from hf_shrink.pruning.zeros import ZeroKeeper
from hf_shrink.sharding import ranks, share
from hf_shrink.training.distillation import Distillation, DistillationTrainer
from hf_shrink.training.distillation.counted import Counted, some
from hf_shrink.training.recovery.spread import Stand, spreads
from hf_shrink.tuning.allowance import Allowance

MOST_STEPS = 10**7  # where only minutes end the training
Batch = Mapping[str, Any]


class Batches(Dataset[Batch]):
    """Batches that are made already, one an example."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> Batch:
        return self._batches[number]


class _Trainer(DistillationTrainer):
    """Lets an allowance say how fast it learns, of batches that all have something to learn from."""

    allowance: Allowance

    def _counted(self, batch: dict[str, Any], outputs: Any) -> Counted:
        return some(super()._counted(batch, outputs))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        made: Any = optimizer or self.optimizer
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(made, self.allowance.rate)
        return self.lr_scheduler


class _Watch(TrainerCallback):
    """Ends the training when it is time, and says how far it is."""

    def __init__(self, allowance: Allowance, progress: ProgressCallback) -> None:
        self._allowance, self._progress = allowance, progress

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        steps, seconds = self._allowance.steps, self._allowance.seconds
        if seconds is None:
            assert steps is not None
            self._progress("recovering", state.global_step, steps)
        else:
            whole = max(1, round(seconds))
            self._progress("recovering", min(whole, round(self._allowance.fraction(state.global_step) * whole)), whole)
        if self._allowance.over(state.global_step):
            control.should_training_stop = True


class Session:
    """One student in training, in this process or in several, which then share the batches of a step.

    Args:
        trained: the model, or the adapters around it. Under FSDP a copy is trained, and it has the weights afterwards.
        batches: of one forward pass each; `held_out` are not trained on.
        accumulate: how many of them make a step in each process.
        rate: the largest learning rate.

    Raises:
        ShrinkError: as of `spreads`.
    """

    def __init__(
        self,
        trained: nn.Module,
        teacher: PreTrainedModel | None,
        distillation: Distillation,
        kept: Any,
        batches: Sequence[Batch],
        held_out: Sequence[Batch],
        accumulate: int,
        rate: float,
        seed: int,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="hf_shrink_recovery_")
        device = ranks().device or next(trained.parameters()).device
        self._stand = Stand(trained) if spreads() else None
        arguments = TrainingArguments(
            output_dir=self._folder.name,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=accumulate,
            max_steps=MOST_STEPS,
            learning_rate=rate,
            weight_decay=0.0,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            bf16=multiplies_bfloat16(device),
            use_cpu=device.type == "cpu",
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        arguments._n_gpu = 1  # one process, one device: where the model is
        self._trained, self._held_out = trained, held_out
        self.steps = 0
        self._trainer = _Trainer(
            trained if self._stand is None else self._stand.model,
            arguments,
            data_collator=_the_only,
            train_dataset=Batches(batches),
            teacher=teacher,
            distillation=distillation,
            kept=kept,
        )

        self._trainer.remove_callback(PrinterCallback)

    def train(self, allowance: Allowance, progress: ProgressCallback) -> None:
        """Raises CalibrationError where a weight that is trained comes out as NaN or infinity."""
        trainer, trained = self._trainer, self._trained
        trainer.allowance = allowance
        trainer.args.max_steps = allowance.steps or MOST_STEPS
        trainer.add_callback(_Watch(allowance, progress))
        keeper = ZeroKeeper(trained)
        with keeper if keeper.kept else nullcontext(), torch.enable_grad():
            trainer.train()
        keeper.close()
        if self._stand is not None:
            self._stand.give_back()
        self.steps = trainer.state.global_step
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad and not torch.isfinite(parameter).all():
                raise CalibrationError(f"recovery made {name} NaN or infinite; lower learning_rate")

    def loss(self, model: nn.Module) -> float:
        """What is trained on, of `model` on the held-out batches; the same figure in all processes."""
        device = next(model.parameters()).device
        own = share(len(self._held_out))
        total = 0.0
        model.eval()
        with torch.no_grad(), self._trainer.accelerator.autocast():
            for batch in own.of(self._held_out):
                there = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                total += float(self._trainer.compute_loss(model, there))
        return own.totals([total])[0] / len(self._held_out)

    def close(self) -> None:
        """Take off what training left on the model."""
        self._trainer.accelerator.unwrap_model(self._trainer.model_wrapped, keep_fp32_wrapper=False)
        self._folder.cleanup()


def _the_only(examples: list[Batch]) -> dict[str, Any]:
    (batch,) = examples
    return dict(batch)


@contextmanager
def in_eval_mode(model: nn.Module | None) -> Iterator[None]:
    """The model, where there is one, without dropout; its modules' modes and its device are as they were afterwards."""
    if model is None:
        yield
        return
    device = next(model.parameters()).device
    try:
        with modes_kept(model):
            model.eval()
            yield
    finally:
        if next(model.parameters()).device != device:
            model.to(device)


@contextmanager
def left_as_found(model: PreTrainedModel) -> Iterator[None]:
    """What Trainer, accelerate and PEFT put on a model is gone afterwards; modes of modules and the CPU's generators
    of random numbers are as they were."""
    attributes, cache = set(vars(model)), getattr(model.config, "use_cache", None)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        with modes_kept(model):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        for name in set(vars(model)) - attributes:
            del vars(model)[name]
        if cache is not None:
            model.config.use_cache = cache
