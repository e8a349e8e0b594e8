"""One fine-tuning of the training benchmarks, with a recipe carried out while it goes on, after it, or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import stopwatch
from training_tasks import TASKS, AccuracyAndF1, Rows, Task
from transformers import Trainer, TrainingArguments

from hf_shrink import DistillationTrainer, ShrinkCallback, shrink


@dataclass(frozen=True)
class Trained:
    """What came of it.

    Attributes:
        folder: the trainer's, which is gone afterwards.
        figures: what both benchmarks write down.
    """

    task: Task
    model: Any
    trainer: Trainer
    held_out: Rows
    folder: Path
    figures: dict[str, Any]


@contextmanager
def trained(
    job: Mapping[str, Any],
    recipe: dict[str, Any] | None,
    while_training: bool,
    cache: Path,
    window: Mapping[str, float],
    distillation: Mapping[str, float] | None = None,
    **options: Any,
) -> Iterator[Trained]:
    """Train, compress and measure the job's task.

    Args:
        recipe: None for the dense model. It is kept in `cache`, taken from there the next time, and compressed after
            training from there; it teaches too.
        window: of the callback.
        distillation: what is learned from the dense model while training; None: from labels alone.
        options: of `shrink`, after training.
    """
    torch.set_num_threads(job["threads"])
    task = TASKS[job["task"]]
    train, held_out = task.rows()
    dense = cache / f"{job['task']}-{job['seed']}"
    metric = AccuracyAndF1(keep_in_memory=True)
    kept = (dense / "config.json").is_file()
    trains = while_training if recipe is not None else not kept
    wanted = distillation is not None or (recipe is not None and not while_training)
    if wanted and not kept:
        raise FileNotFoundError(f"{dense} holds no dense model; run {job['task']}:dense:{job['seed']} first")
    with tempfile.TemporaryDirectory() as folder:
        with stopwatch() as took:
            model = task.model(job["seed"]) if trains else type(task.model(0)).from_pretrained(dense)
            kind: Any = Trainer
            if distillation is not None:
                teacher = type(model).from_pretrained(dense)
                kind = partial(DistillationTrainer, teacher=teacher, distillation=distillation)
            trainer = kind(
                model=model,
                args=TrainingArguments(
                    output_dir=folder,
                    seed=job["seed"],
                    use_cpu=True,
                    report_to=[],
                    save_strategy="no",
                    logging_steps=50,
                    disable_tqdm=True,
                    **task.settings,
                ),
                train_dataset=train,
                eval_dataset=held_out,
                callbacks=[ShrinkCallback(recipe, **window)] if recipe is not None and while_training else [],
                compute_metrics=lambda p: metric.compute(predictions=p.predictions.argmax(-1), references=p.label_ids),
            )
            if trains:
                trainer.train()
            elif recipe is not None:
                batches = [trainer.data_collator(train[i : i + 32]) for i in range(0, 512, 32)]
                shrink(model, recipe, calibration=batches, seed=job["seed"], progress=False, **options)
            if recipe is None and trains:
                model.save_pretrained(dense)
            measured = trainer.evaluate()
        figures = {
            **{key: round(measured[f"eval_{key}"], 4) for key in ("accuracy", "f1", "loss")},
            "steps": trainer.state.global_step,
            **took,
            "threads": torch.get_num_threads(),
        }
        yield Trained(task, model, trainer, held_out, Path(folder), figures)
