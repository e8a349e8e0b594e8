"""The tuning loop: end-to-end distillation of the quantized model, as the second phase of EfficientQAT
(Chen et al., arXiv 2407.11062), against the dense model's predictions instead of the next token."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from hf_shrink.architectures.binding import bind
from hf_shrink.calibration.rerunning import rerunning_blocks
from hf_shrink.errors import CalibrationError
from hf_shrink.progress import ProgressCallback
from hf_shrink.runtime.linear import CompressedLinear
from hf_shrink.tuning.allowance import Allowance
from hf_shrink.tuning.opened import Opened, open_model
from hf_shrink.tuning.options import Tuning
from hf_shrink.tuning.teacher import Teacher

FIRST_SCALE = 2.0**10  # of a float16 model's gradients; halved where they become infinite
MOST_ROUNDED = 1_000_000_000  # weights whose rounding is trained where the user leaves it to us


@dataclass(frozen=True)
class Tuned:
    """What came of tuning.

    Attributes:
        before, after: loss on the held-out batches, in the teacher's unit.
        steps: that were taken.
        notes: what the user should know.
    """

    before: float
    after: float
    steps: int
    notes: tuple[str, ...]


def tune(
    model: PreTrainedModel,
    teacher: Teacher,
    options: Tuning,
    seed: int,
    progress: ProgressCallback,
    seconds: float | None = None,
) -> Tuned:
    """Tune a quantized model in place.

    The last batches are held out: when they are not nearer to the dense model afterwards, with everything rounded to
    what is stored, the model goes back to what it was.

    Args:
        teacher: of the dense model.
        seed: of the batches' order.
        seconds: training ends after so many, if not before.

    Raises:
        CalibrationError: fewer than two batches, or a loss that is not finite.
    """
    batches = teacher.batches
    if batches < 2:
        raise CalibrationError(
            "tune needs at least 2 batches, one of them held out; raise calibration.samples or lower batch_size"
        )
    held = min(batches - 1, max(1, round(batches * options.held_out)))
    training, held_out = range(batches - held), range(batches - held, batches)
    before = _mean_loss(model, teacher, held_out)
    weights = sum(module.numel for module in model.modules() if type(module) is CompressedLinear)
    rounding = weights <= MOST_ROUNDED if options.rounding == "auto" else options.rounding
    opened = open_model(model, rounding)
    with ExitStack() as stack:
        stack.callback(opened.undo)
        with torch.enable_grad(), rerunning_blocks([block.module for block in bind(model).blocks]):
            allowance = Allowance(options.steps, seconds)
            steps = _train(opened, teacher, training, options, allowance, seed, progress)
        opened.close()
        after = _mean_loss(model, teacher, held_out)
        if after < before:
            stack.pop_all()
    if not after < before:
        note = f"tuning was taken back: {teacher.unit} on held-out batches {before:.4g} before, {after:.4g} after"
        return Tuned(before, after, steps, (note,))
    notes = [f"tuning took the {teacher.unit} on held-out batches from {before:.4g} to {after:.4g}"]
    if options.rounding == "auto" and not rounding:
        notes.append(
            f"tuning left the rounding of {weights:,} weights alone; tune.rounding: true trains it (16 bytes each)"
        )
    return Tuned(before, after, steps, tuple(notes))


def _train(
    opened: Opened,
    teacher: Teacher,
    batches: Sequence[int],
    options: Tuning,
    allowance: Allowance,
    seed: int,
    progress: ProgressCallback,
) -> int:
    """Adam with a short warm-up and a cosine down to zero; returns how many steps were taken."""
    assert allowance.steps is not None
    optimizer = torch.optim.Adam(opened.parameter_groups(options), betas=(0.9, 0.95))
    # Small gradients would be zero in float16.
    scaler = torch.amp.GradScaler(opened.model.device.type, FIRST_SCALE, enabled=opened.dtype == torch.float16)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, allowance.rate)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for step in range(allowance.steps):
        if allowance.over(step):
            return step
        if not order:
            order = torch.randperm(len(batches), generator=generator).tolist()
        opened.round()
        loss = teacher.loss(opened.model, batches[order.pop()])
        if not torch.isfinite(loss):
            raise CalibrationError(f"tuning came to a loss that is not finite in step {step}; lower tune.learning_rate")
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        progress("tuning", step + 1, allowance.steps)
    return allowance.steps


def _mean_loss(model: PreTrainedModel, teacher: Teacher, batches: Sequence[int]) -> float:
    with torch.no_grad():
        return sum(float(teacher.loss(model, index)) for index in batches) / len(batches)
