"""The tuning loop: end-to-end distillation of the quantized model, as the second phase of EfficientQAT
(Chen et al., arXiv 2407.11062), against the dense model's predictions instead of the next token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from transformers import PreTrainedModel

from hf_shrink.architectures.binding import bind
from hf_shrink.calibration.rerunning import rerunning_blocks
from hf_shrink.errors import CalibrationError
from hf_shrink.progress import ProgressCallback
from hf_shrink.runtime.linear import CompressedLinear
from hf_shrink.tuning.opened import open_model
from hf_shrink.tuning.options import Tuning
from hf_shrink.tuning.teacher import Teacher

WARMUP = 0.05  # of the steps
MOST_ROUNDED = 1_000_000_000  # weights whose rounding is trained where the user leaves it to us


def tune(
    model: PreTrainedModel,
    teacher: Teacher,
    options: Tuning,
    seed: int,
    progress: ProgressCallback,
) -> list[str]:
    """Tune a quantized model in place; returns what the user should know.

    The last batches are held out: when they are not nearer to the dense model afterwards, with everything rounded to
    what is stored, the model goes back to what it was.

    Args:
        teacher: of the dense model.
        seed: of the batches' order.

    Raises:
        CalibrationError: fewer than two batches, or a loss that is not finite.
    """
    batches = teacher.batches
    if batches < 2:
        raise CalibrationError(
            "tune needs at least 2 batches, one of them held out; raise calibration.samples or lower batch_size"
        )
    held = max(1, round(batches * options.held_out))
    training, held_out = range(batches - held), range(batches - held, batches)
    before = _mean_loss(model, teacher, held_out)
    weights = sum(module.numel for module in model.modules() if type(module) is CompressedLinear)
    rounding = weights <= MOST_ROUNDED if options.rounding == "auto" else options.rounding
    opened = open_model(model, rounding)
    with ExitStack() as stack:
        stack.callback(opened.undo)
        with torch.enable_grad(), rerunning_blocks([block.module for block in bind(model).blocks]):
            _train(model, teacher, training, opened.parameter_groups(options), options, seed, progress)
        stack.pop_all()
    opened.close()
    after = _mean_loss(model, teacher, held_out)
    if not after < before:
        opened.undo()
        return [f"tuning was taken back: {teacher.unit} on held-out batches {before:.4g} before, {after:.4g} after"]
    notes = [f"tuning took the {teacher.unit} on held-out batches from {before:.4g} to {after:.4g}"]
    if options.rounding == "auto" and not rounding:
        notes.append(
            f"tuning left the rounding of {weights:,} weights alone; tune.rounding: true trains it (16 bytes each)"
        )
    return notes


def _train(
    model: PreTrainedModel,
    teacher: Teacher,
    batches: Sequence[int],
    groups: list[dict[str, object]],
    options: Tuning,
    seed: int,
    progress: ProgressCallback,
) -> None:
    """Adam with a short warm-up and a cosine down to zero."""
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, options.steps))
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for step in range(options.steps):
        if not order:
            order = torch.randperm(len(batches), generator=generator).tolist()
        loss = teacher.loss(model, batches[order.pop()])
        if not torch.isfinite(loss):
            raise CalibrationError(f"tuning came to a loss that is not finite in step {step}; lower tune.learning_rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        progress("tuning", step + 1, options.steps)


def _rate(step: int, steps: int) -> float:
    warm = max(1, round(steps * WARMUP))
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _mean_loss(model: PreTrainedModel, teacher: Teacher, batches: Sequence[int]) -> float:
    with torch.no_grad():
        return sum(float(teacher.loss(model, index)) for index in batches) / len(batches)
