"""`DistillationTrainer`: transformers' Trainer for a student that learns from a teacher."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from hf_shrink.calibration.targets import kind_by_labels, kind_of, model_inputs
from hf_shrink.errors import ArchitectureError, RecipeError
from hf_shrink.training.distillation.cache import CachedTeacher, fingerprints
from hf_shrink.training.distillation.counted import Counted, counted, divergence_of
from hf_shrink.training.distillation.numbered import NUMBER, Numbered, NumberedCollator
from hf_shrink.training.distillation.options import Distillation
from hf_shrink.training.distillation.states import (
    Kept,
    StackPair,
    attention_divergence,
    attention_of,
    hidden_error,
    pair_stacks,
    watching,
)
from hf_shrink.training.models import unwrapped
from hf_shrink.tuning.divergence import largest_divergence

_DROPOUTS = ("attention_dropout", "attention_probs_dropout_prob")


class DistillationTrainer(Trainer):
    """Trains a student on a teacher's predictions, on its own labels, or on both.

        trainer = DistillationTrainer(small, args, train_dataset=data, teacher=dense,
                                      distillation={"logits": 0.5, "task": 0.5, "temperature": 2.0})
        trainer.train()

    Works for all heads: next, masked and decoded tokens, classes of a sequence or of tokens, spans of an answer,
    numbers; labels of -100 never count, and a batch of nothing else adds nothing. Under gradient accumulation and over
    several processes every prediction counts the same, as for Trainer's own loss. `distillation_loss` and `task_loss`
    are logged beside `loss`, means over the same predictions of all processes.

    A teacher in memory runs on its own device, whole in every process (FSDP shards the student only). A cached one
    teaches on `train_dataset` only; evaluation gives the task's loss then.

    Args:
        teacher: the dense model; a `CachedTeacher`, or the folder of one; None where every part but `task` is 0.
        distillation: a `Distillation`, or a mapping of its fields.
        kept: for each stack, which of the teacher's blocks the student's were. Needed for hidden states and attention
            of a student with fewer blocks that carries no plan of ours.
        teacher_device: where to put a teacher in memory; None: where the student is. "stay": where it is.
        arguments, keywords: Trainer's.

    Raises:
        RecipeError: the parts of the loss do not go with this teacher or these arguments.
        ArchitectureError: student and teacher cannot be compared inside.
        CheckpointError: the folder holds no cached teacher.
        CalibrationError: while training: student and teacher predict different things.
    """

    def __init__(
        self,
        *arguments: Any,
        teacher: PreTrainedModel | CachedTeacher | str | os.PathLike[str] | None,
        distillation: Distillation | Mapping[str, Any] | None = None,
        kept: Kept | None = None,
        teacher_device: torch.device | str | None = None,
        **keywords: Any,
    ) -> None:
        self.distillation = Distillation.of(distillation or {})
        self.teacher = CachedTeacher(teacher) if isinstance(teacher, str | os.PathLike) else teacher
        super().__init__(*arguments, **keywords)
        self._kind = kind_of(self._student)
        self._check()
        self._pairs: tuple[StackPair, ...] = ()
        self._logged: dict[str, tuple[Tensor, float]] = {}  # sums of parts of the loss, and of how many steps
        if isinstance(self.teacher, CachedTeacher):
            numbered = Numbered(self.train_dataset)
            if len(self.teacher) != len(numbered):
                raise RecipeError(
                    f"the cached teacher knows {len(self.teacher)} examples and train_dataset has {len(numbered)}; run "
                    "cache_teacher() on this data set"
                )
            self.train_dataset = numbered
            self.data_collator = NumberedCollator(self.data_collator)
        elif self.teacher is not None:
            self.teacher.eval()
            if teacher_device != "stay":
                self.teacher.to(torch.device(self.args.device if teacher_device is None else teacher_device))  # type: ignore[arg-type]
            if self.distillation.inside:
                self._pairs = pair_stacks(self._student, self.teacher, kept)

    @property
    def _student(self) -> Any:
        """Trainer makes another model for every training where it was given `model_init`."""
        return _base(self.model)

    def _check(self) -> None:
        parts, teacher = self.distillation, self.teacher
        if teacher is None and parts.needs_teacher:
            raise RecipeError("distillation needs a teacher; pass teacher=, or logits, hidden and attention of 0")
        if self.args.n_gpu > 1:
            raise RecipeError(
                "one process on several GPUs (DataParallel) is not supported; start one a GPU with accelerate launch"
            )
        if isinstance(teacher, CachedTeacher):
            if parts.inside:
                raise RecipeError("a cached teacher has its predictions only; set hidden and attention to 0")
            if parts.logits and parts.temperature != teacher.index.temperature:
                raise RecipeError(
                    f"the teacher was cached at temperature {teacher.index.temperature:g}, not {parts.temperature:g}; "
                    "give distillation that temperature, or run cache_teacher() again"
                )
        elif teacher is not None and self.distillation.attention:
            for name, model in (("model", self._student), ("teacher", teacher)):
                config: Any = model.config
                if config._attn_implementation != "eager":
                    raise ArchitectureError(
                        f"the {name} computes attention by {config._attn_implementation!r}, which does not give its "
                        "weights; call set_attn_implementation('eager') on it, or set attention to 0"
                    )
            dropout = next((n for n in _DROPOUTS if getattr(self._student.config, n, 0.0)), None)
            if dropout is not None:
                raise ArchitectureError(f"attention with dropout cannot be compared; set the model's {dropout} to 0")

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns
        if columns is not None and NUMBER not in columns:
            columns.append(NUMBER)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """See Trainer. The loss is normalised as Trainer's own."""
        numbers = inputs.get(NUMBER)
        batch = {key: value for key, value in inputs.items() if key != NUMBER}
        parts = self.distillation
        teaches = numbers is not None if isinstance(self.teacher, CachedTeacher) else self.teacher is not None
        runs = _base(unwrapped(model)) if parts.hidden else None
        with watching([] if runs is None else [block for pair in self._pairs for block in pair.own(runs)]) as own:
            task, outputs = self._run(model, batch, num_items_in_batch, with_task=bool(parts.task) or not teaches)
        loss = task * (parts.task if teaches else 1.0) if task is not None else None
        if teaches and parts.needs_teacher:
            rows = self._counted(batch, outputs)
            distance = self._distance(batch, numbers, rows, outputs, own)
            scaled = distance * self._share(rows, batch, num_items_in_batch)
            loss = scaled if loss is None else loss + scaled
            self._note("distillation_loss", scaled, num_items_in_batch)
        if task is not None and teaches:
            self._note("task_loss", task, num_items_in_batch)
        outputs = _without_attention(outputs) if parts.attention else outputs
        return (loss, outputs) if return_outputs else loss

    def _run(self, model: nn.Module, batch: dict[str, Any], items: Any, *, with_task: bool) -> tuple[Any, Any]:
        """The task's loss (None where it is not wanted) and the outputs."""
        inputs = dict(batch)
        if self.distillation.attention:
            inputs["output_attentions"] = True
        if with_task:
            task, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=items)
            return task, outputs
        return None, model(**model_inputs(self._kind, inputs))

    def _counted(self, batch: dict[str, Any], outputs: Any) -> Counted:
        kind = kind_by_labels(self._kind, batch, outputs, self._student, self.teacher)
        return counted(kind, batch, outputs, self._student)

    def _distance(
        self, batch: dict[str, Any], numbers: Tensor | None, rows: Counted, outputs: Any, own: Mapping[int, Tensor]
    ) -> Tensor:
        """The weighted parts of the loss that a teacher gives, a mean over the predictions that count."""
        parts = self.distillation
        if not len(rows.values):
            return rows.values.sum()  # 0, with the gradients that other processes wait for
        if isinstance(self.teacher, CachedTeacher):
            assert numbers is not None
            target = self.teacher.read(numbers.tolist(), rows, fingerprints(self._student, batch))
            return parts.logits * largest_divergence(rows.values, target, parts.temperature)
        dense, seen = self._taught(batch)
        total: list[Tensor] = []
        if parts.logits:
            total.append(parts.logits * divergence_of(rows, self._counted(batch, dense), parts.temperature))
        for pair, states, wanted in zip(
            self._pairs, self._by_stack(own, True), self._by_stack(seen, False), strict=True
        ):
            if parts.hidden:
                total.append(parts.hidden / len(self._pairs) * hidden_error(pair, states, wanted, batch, self._student))
            if parts.attention:
                weights, aims = attention_of(outputs, pair.name), attention_of(dense, pair.name)
                found = attention_divergence(pair, weights, aims, batch, self._student)
                total.append(parts.attention / len(self._pairs) * found)
        return torch.stack(total).sum()

    def _taught(self, batch: dict[str, Any]) -> tuple[Any, dict[int, Tensor]]:
        """The teacher's outputs, and its hidden states."""
        teacher = self.teacher
        assert isinstance(teacher, PreTrainedModel)
        inputs = {k: v.to(teacher.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        if self.distillation.attention:
            inputs["output_attentions"] = True
        blocks = [block for pair in self._pairs for block in pair.dense] if self.distillation.hidden else []
        with torch.no_grad(), self.accelerator.autocast(), watching(blocks) as seen:
            outputs = teacher(**model_inputs(self._kind, inputs))
        return outputs, seen

    def _by_stack(self, seen: Mapping[int, Tensor], own: bool) -> list[dict[int, Tensor]]:
        """What was seen of all stacks in a row, stack by stack."""
        found, first = [], 0
        for pair in self._pairs:
            count = len(pair.kept if own else pair.dense)
            found.append({n - first: seen[n] for n in range(first, first + count) if n in seen})
            first += count
        return found

    def _share(self, rows: Counted, batch: dict[str, Any], items: Tensor | int | None) -> Any:
        """What a mean over this batch counts for in the step, as Trainer weighs its own loss."""
        if not len(rows.values):
            return 0.0  # and the whole step may have none
        if items is None or not self._of_step(items):
            return 1.0
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        labels = batch.get("labels")
        each = not rows.distribution and labels is not None and labels.shape == rows.values.shape
        count = rows.values.numel() if each else len(rows.values)  # as Trainer counts labels: one by one
        return count * processes / items

    def _of_step(self, items: Tensor | int | None) -> bool:
        """Whether a batch's loss is its share of the step's, to be added up, and no mean of its own."""
        return items is not None and (self.model_accepts_loss_kwargs or self.compute_loss_func is not None)

    def _note(self, name: str, value: Tensor, items: Tensor | int | None) -> None:
        """Count a part of a batch's loss as the step counts it."""
        if self.model is None or not self.model.training:
            return
        batches = getattr(self, "current_gradient_accumulation_steps", 1)  # is there as long as Trainer trains
        total, steps = self._logged.get(name, (torch.zeros((), device=value.device), 0.0))
        found = value.detach().float() / (1 if self._of_step(items) else batches)
        self._logged[name] = total + found, steps + 1 / batches

    def log(self, logs: dict[str, float], *arguments: Any, **keywords: Any) -> None:
        """See Trainer. Beside a training loss go the parts that it was made of, means since the last time."""
        if "loss" in logs:
            for name, (total, steps) in self._logged.items():
                mean: Any = self.accelerator.reduce(total / steps, reduction="mean")
                logs[name] = round(float(mean), 6)
            self._logged = {}
        super().log(logs, *arguments, **keywords)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """See Trainer. Without labels the loss is what the teacher gives."""
        labelled = any(inputs.get(name) is not None for name in self.label_names)
        teaches = isinstance(self.teacher, PreTrainedModel) and self.distillation.needs_teacher
        if labelled or not teaches or self.distillation.task:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), None if prediction_loss_only else outputs.get("logits"), None


def _base(model: Any) -> Any:
    """The model that an adapter is around."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _without_attention(outputs: Any) -> Any:
    """Outputs as if nobody had asked for attention weights, which are large."""
    return type(outputs)(**{k: v for k, v in outputs.items() if not k.endswith("attentions")})
