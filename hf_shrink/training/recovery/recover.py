"""`recover`: a compressed model trained until it is near to what it was, and adopted only if it is nearer."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_shrink.calibration.data import calibration_batches
from hf_shrink.calibration.targets import IGNORED, kind_of
from hf_shrink.checkpoint.inference import optimize_for_inference
from hf_shrink.errors import ArchitectureError, CalibrationError, RecipeError
from hf_shrink.progress import ProgressCallback
from hf_shrink.recipe import CalibrationSpec
from hf_shrink.reporting.progress import showing, silence
from hf_shrink.runtime.packed import PackedModule
from hf_shrink.sharding import Ranks, ranks, together
from hf_shrink.training.distillation import Distillation
from hf_shrink.training.distillation.states import Kept
from hf_shrink.training.recovery.changes import Change, Full
from hf_shrink.training.recovery.lora import Lora
from hf_shrink.training.recovery.options import RANK, Method, Recovery
from hf_shrink.training.recovery.session import Batch, Session, in_eval_mode, left_as_found
from hf_shrink.training.recovery.spread import alike, spreads
from hf_shrink.tuning import Teacher, Tuning, regrouped, tune
from hf_shrink.tuning.allowance import Allowance

LOGITS = 2**26  # of one forward pass with gradients, in elements
MOST_STEPS = 10_000  # of "scales" where only minutes end the training


@dataclass(frozen=True)
class Recovered:
    """What came of a recovery.

    Attributes:
        model: to go on with: the model that was passed, or a `PeftModel` around it where adapters could not be merged.
        adopted: whether held-out loss improved; if not, the model is exactly as it was.
        before, after: held-out loss of the model as it is stored.
        unit: what they are in.
        steps: that were taken.
        seconds: wall time of everything.
        note: all of that in a sentence, for reports.
    """

    model: Any
    adopted: bool
    before: float
    after: float
    unit: str
    steps: int
    seconds: float
    note: str


def recover(
    model: PreTrainedModel,
    *,
    data: Any = "self",
    teacher: PreTrainedModel | None = None,
    tokenizer: Any = None,
    kept: Kept | None = None,
    exclude: Sequence[str] | None = None,
    seed: int = 0,
    progress: bool | str | os.PathLike[str] = True,
    **options: Any,
) -> Recovered:
    """Train a pruned or quantized model to predict what the dense one predicts.

        found = recover(model, teacher=dense, tokenizer=tokenizer, data="notes.txt", minutes=15)
        model = found.model

    A share of the data is held out. Where the model, as it would be stored, is not nearer to the teacher on it than it
    was, everything is put back bit for bit. Adapters are merged where all weights are dense; else `found.model` is a
    `PeftModel`: save the model and, beside it, `found.model.save_pretrained("small/adapter")`, and load both with
    `from_pretrained` and `load_adapter`.

    In processes that accelerate or torchrun started, all of them call this, with steps; they share the batches of a
    step (DDP, or FSDP2) and end with the same model. Under FSDP a copy is spread over the accelerators and the model
    itself stays where it is: leave it on the CPU where it does not fit one of them.

    Args:
        model: pruned, packed by hf_shrink, in NF4 by bitsandbytes, or plainly dense. Is changed in place.
        data: as `shrink`'s calibration: "self" (text that the teacher writes), another data recipe's name, the path of
            a .txt, .jsonl or .parquet file, a `datasets.Dataset`, or an iterable of texts or of model-input dicts.
        teacher: the dense model, which is afterwards as it was; None: the data's own tokens or labels are learned,
            which is not what it was.
        tokenizer: needed for text.
        kept: see `DistillationTrainer`; for hidden states only.
        exclude: texts that must not be learned from, because the model will be measured on them.
        seed: of everything random; the same seed and `steps` on the same machine give the same model.
        options: of `Recovery`: method, steps, minutes, learning_rate, rank, tokens, samples, length, ...

    Raises:
        RecipeError: an option is unknown or does not go with the others.
        ArchitectureError: the method does not work on this model.
        ShrinkError: the processes were started with DeepSpeed or FSDP1, or FSDP would lose the model's zeros.
        CalibrationError: the data is missing, too short, or training came to numbers that are not finite.
    """
    started = time.monotonic()
    recovery = Recovery.from_options(options)
    method = _method_for(model, recovery)
    _check(model, teacher, method, recovery)
    with together() as here, showing(progress) as show, silence(), left_as_found(model), in_eval_mode(teacher):
        _check_processes(here, method, recovery)
        alike(model, teacher)
        spec = CalibrationSpec(samples=recovery.samples, length=recovery.length, batch_size=1)
        author = model if teacher is None else teacher
        with in_eval_mode(author):  # text is sampled from it
            made = here.on_first(
                lambda: calibration_batches(
                    spec, source=data, model=author, tokenizer=tokenizer, seed=seed, exclude=exclude, progress=show
                )
            )
        batches = [_labelled(model, batch) if _needs_labels(recovery, teacher) else batch for batch in made.batches]
        until = None if recovery.minutes is None else started + recovery.minutes * 60
        if method == "scales":
            assert teacher is not None
            found = _by_scales(model, teacher, recovery, batches, until, seed, show)
        else:
            found = _by_training(model, teacher, method, recovery, batches, until, kept, seed, show)
    result, before, after, unit, steps = found
    adopted, seconds = after < before, time.monotonic() - started
    changed = f"took the {unit} on held-out data from {before:.4g} to {after:.4g}"
    kept_or_not = (
        changed if adopted else f"was taken back: {unit} on held-out data {before:.4g} before, {after:.4g} after"
    )
    note = f"recovery ({method}, {steps} steps, {seconds / 60:.1f} min, {made.description}) {kept_or_not}"
    if steps <= 1 and until is not None:
        note += "; the preparations took the time: give more minutes, fewer samples, or a text file as data"
    return Recovered(result, adopted, before, after, unit, steps, seconds, note)


def _method_for(model: PreTrainedModel, recovery: Recovery) -> Method:
    if recovery.method is not None:
        return recovery.method
    return "scales" if any(isinstance(m, PackedModule) for m in model.modules()) else "lora"


def _check(model: PreTrainedModel, teacher: Any, method: Method, recovery: Recovery) -> None:
    """Raises for what cannot work, before any data is made."""
    if teacher is model:
        raise RecipeError("the teacher is the model itself; load the dense model a second time")
    if teacher is not None and not isinstance(teacher, PreTrainedModel):
        raise RecipeError(f"the teacher must be a transformers model, not a {type(teacher).__name__}")
    if method == "scales":
        if teacher is None:
            raise RecipeError("method 'scales' learns from the dense model; pass teacher=")
        if not any(isinstance(m, PackedModule) for m in model.modules()):
            raise ArchitectureError("no weight is packed, so there are no scales to train; use method 'lora' or 'full'")
        if recovery.hidden or recovery.task or recovery.temperature != 1.0:
            raise RecipeError("method 'scales' learns predictions only; leave out hidden, task and temperature")
    elif recovery.rounding:
        raise RecipeError("rounding is trained by method 'scales' only; leave it out")
    if method != "lora" and recovery.rank is not None:
        raise RecipeError(
            f"rank is of the adapters of method 'lora', and this is {method!r}: leave it out, or take 'lora'"
        )
    if teacher is None and recovery.hidden:
        raise RecipeError("hidden states are the teacher's; pass teacher=, or leave out hidden")


def _check_processes(here: Ranks, method: Method, recovery: Recovery) -> None:
    """Raises for what does not work in several processes."""
    if here.size == 1:
        return
    if recovery.minutes is not None:
        raise RecipeError(
            "several processes must take the same steps, and clocks differ; give steps instead of minutes"
        )
    if method == "scales":
        raise RecipeError("method 'scales' trains in one process: start it without a launcher, or take method 'lora'")
    spreads()


def _by_scales(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    recovery: Recovery,
    batches: Sequence[Batch],
    until: float | None,
    seed: int,
    progress: ProgressCallback,
) -> tuple[Any, float, float, str, int]:
    optimized = any(module.kernel is not None for module in model.modules() if isinstance(module, PackedModule))
    model.eval()
    tokens = recovery.step("scales")
    known = Teacher(teacher, regrouped(batches, tokens), progress)
    options = Tuning(
        steps=recovery.steps or MOST_STEPS,
        learning_rate=recovery.learning_rate,  # None: by the bits
        rounding=recovery.rounding,
        held_out=recovery.held_out,
        tokens=tokens,
    )
    found = tune(model, known, options, seed, progress, None if until is None else until - time.monotonic())
    if optimized:
        optimize_for_inference(model)
    return model, found.before, found.after, known.unit, found.steps


def _by_training(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    method: Method,
    recovery: Recovery,
    batches: Sequence[Batch],
    until: float | None,
    kept: Kept | None,
    seed: int,
    progress: ProgressCallback,
) -> tuple[Any, float, float, str, int]:
    size, accumulate = _sizes(model, recovery.step(method), ranks().size)
    groups = regrouped(batches, size)
    if len(groups) < 2:
        raise CalibrationError("recovery needs at least 2 batches, one of them held out; give more data")
    count = min(len(groups) - 1, max(1, round(len(groups) * recovery.held_out)))
    parts = Distillation(
        logits=float(teacher is not None),
        task=recovery.task if teacher is not None else 1.0,
        hidden=recovery.hidden,
        temperature=recovery.temperature,
    )
    change: Change = Full(model) if method == "full" else Lora(model, recovery.rank or RANK, seed)
    session, adopted = None, False
    try:
        session = Session(
            change.trained,
            teacher,
            parts,
            kept,
            groups[:-count],
            groups[-count:],
            min(accumulate, max(1, (len(groups) - count) // ranks().size)),
            recovery.rate(method),
            seed,
        )
        clock = time.monotonic()
        with change.untrained() as stored:
            before = session.loss(stored)
        measuring = time.monotonic() - clock
        seconds = None if until is None else until - time.monotonic() - measuring  # it is measured once more
        session.train(Allowance(recovery.steps, seconds), progress)
        session.close()
        result = change.finish()
        after = session.loss(result)
        adopted = after < before
    finally:
        if session is not None:
            session.close()
        if not adopted:
            change.undo()
    return (result if adopted else model), before, after, _unit(parts), session.steps


def _unit(parts: Distillation) -> str:
    if parts.task and not parts.logits:
        return "loss on the data's own labels"
    return "divergence from the dense model" if not (parts.task or parts.hidden) else "loss"


def _sizes(model: PreTrainedModel, tokens: int, processes: int) -> tuple[int, int]:
    """Tokens of a forward pass, whose logits have to fit, and how many such passes of a process make a step."""
    head: Any = model.get_output_embeddings()
    classes = int(getattr(head, "out_features", 1)) if head is not None else 1
    size = min(math.ceil(tokens / processes), max(1, LOGITS // classes))
    return size, max(1, round(tokens / (size * processes)))


def _needs_labels(recovery: Recovery, teacher: Any) -> bool:
    return bool(recovery.task) or teacher is None


def _labelled(model: PreTrainedModel, batch: Mapping[str, Any]) -> Batch:
    """The batch with labels: its own, or the next tokens. Raises CalibrationError where it can have none."""
    if "labels" in batch or "start_positions" in batch:
        return batch
    ids = batch.get("input_ids")
    if kind_of(model) != "causal" or not isinstance(ids, torch.Tensor):
        raise CalibrationError(
            "the data has no labels for this model's head, so its own loss cannot be trained; give data with labels, "
            "or a teacher and task 0"
        )
    mask = batch.get("attention_mask")
    return {**batch, "labels": ids if mask is None else ids.masked_fill(mask == 0, IGNORED)}
