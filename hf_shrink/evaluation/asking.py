"""Both models asked the rows of a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_shrink.evaluation.batches import Pass, Subjects
from hf_shrink.evaluation.observed import Columns, Observed
from hf_shrink.evaluation.recipes import TaskRecipe
from hf_shrink.evaluation.rows import columns_of
from hf_shrink.evaluation.tasks import TASKS, Progressing, Row, Subject, Task
from hf_shrink.progress import ProgressCallback, quiet

_VECTORS = ("log_probabilities", "vectors", "other_vectors")  # needed to compare, not afterwards


def ask(
    task: Task, rows: Sequence[Row], subjects: Subjects, recipe: TaskRecipe, progress: ProgressCallback | None
) -> Pass:
    """Ask one model after the other; a row leaves a few numbers or a text.

    Raises:
        CalibrationError: a model cannot do the task, or the rows do not fit it.
    """
    own = Subject(subjects.model, subjects.processing, recipe.length)
    task.check(own)
    observed = Observed(data=task.references(own, rows))
    tick, total = progress or quiet, len(rows) * len(subjects.models)
    run = Progressing(recipe.batch_size, tick, total)
    observed.model = task.answers(own, rows, run)
    if subjects.baseline is not None:
        processing = subjects.baseline_processing or subjects.processing
        dense = Subject(subjects.baseline, processing, recipe.length)
        task.check(dense)
        observed.baseline = task.answers(dense, rows, run)
        observed.between = task.between(observed.model, observed.baseline)
    for columns in (observed.model, observed.baseline):
        _forget(columns)
    groups = [row.get("group") for row in rows]
    observed.groups = groups if any(group is not None for group in groups) else []
    observed.missing = dict.fromkeys(("divergence", "agreeing", "cosine"), "needs the dense model as baseline")
    if subjects.baseline is not None:
        observed.missing = dict.fromkeys(observed.missing, f"the task {recipe.task} does not give it")
    return Pass(observed, 0, recipe.task)


def fitting_task(model: Any, columns: Sequence[str]) -> tuple[str, Task] | None:
    """The task, by name, that a model was made for and that rows with these columns hold; None: they are plain data."""
    if getattr(model, "main_input_name", "input_ids") in columns:
        return None  # made into model inputs already
    for name in TASKS.names():
        task = TASKS.build(name, {})
        known = columns_of(task, columns, {})
        if task.suits(model) and all(role in known for role in task.roles if role not in task.optional):
            return name, task
    return None


def _forget(columns: Columns) -> None:
    for name in _VECTORS:
        columns.pop(name, None)
