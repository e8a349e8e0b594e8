"""A model, and how far it is from its dense form, on held-out data or on rows with right answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hf_shrink.calibration.data import CalibrationData, calibration_batches, is_data_set
from hf_shrink.calibration.recipes import check_data_name
from hf_shrink.calibration.recipes import recipe_names as data_names
from hf_shrink.calibration.targets import Batch, kind_of, without_placeholders
from hf_shrink.errors import CalibrationError
from hf_shrink.evaluation.asking import ask, fitting_task
from hf_shrink.evaluation.batches import Pass, Subjects, pass_over
from hf_shrink.evaluation.bootstrap import ratio_interval
from hf_shrink.evaluation.changed import given, given_of_rows
from hf_shrink.evaluation.costs import add_costs
from hf_shrink.evaluation.dense_copies import dense_copies
from hf_shrink.evaluation.figures import Metrics, opened_metrics
from hf_shrink.evaluation.insights import add_explanations
from hf_shrink.evaluation.metrics import check_names
from hf_shrink.evaluation.observed import Observed
from hf_shrink.evaluation.recipes import TaskRecipe, evaluation_spec, recipe_names
from hf_shrink.evaluation.rows import ROW_FILES, Table, table_of
from hf_shrink.evaluation.tasks import TASKS, Row, Subject, Task
from hf_shrink.evaluation.windows import sliding
from hf_shrink.modes import modes_kept
from hf_shrink.progress import ProgressCallback
from hf_shrink.recipe import METRICS, EvaluationSpec
from hf_shrink.runtime.attention import grouped_attention
from hf_shrink.sharding import ranks, together

Spec = EvaluationSpec | TaskRecipe | Mapping[str, Any]


def evaluate_model(
    model: Any,
    data: Any,
    *,
    baseline: Any = None,
    metrics: Sequence[str] | None = None,
    tokenizer: Any = None,
    baseline_tokenizer: Any = None,
    spec: Spec | None = None,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Measure a model, and how far it is from its dense `baseline`, on held-out data or on rows with right answers.

    On text, causal models predict each window's next tokens (the first of a window is not predicted; windows are
    independent, or overlap where the spec has a stride); encoder-decoders the decoder's; masked models 15% of the
    tokens, masked with a fixed seed, which makes perplexity a pseudo-perplexity. Models with class logits are compared
    on those, by each class where there may be several at once (`problem_type` of the config); heads for numbers by the
    ranks of these, each of which counts as a sequence; models without any logits by the cosine of their last hidden
    states. Padding and labels of -100 never count. Logits are not kept beyond a few sequences; log-softmax is float32
    and sums are float64.

    On rows, each model answers alone: classes, tags, stretches of text, choices, written text, transcripts, embeddings
    (`evaluation/tasks/`).

    In processes that accelerate or torchrun started, all of them call this on the same models; they share the batches,
    and the first one asks rows.

    Args:
        model: the compressed model.
        data: a CalibrationData; a list of dicts of tensors (with "labels" of classes, and "group" as a list, where
            there are any); what `evaluation_spec` reads: a recipe's or data set's name, or the path of a .txt, .jsonl,
            .parquet or .csv file; a list of texts or a `datasets.Dataset`; or a list of dicts as rows. Rows whose
            columns are those of a task that the model was made for are asked; others are text.
        baseline: the dense model; without one there is nothing that compares.
        metrics: of `metrics.NAMES`; None: the spec's; else all that a task or labels allow, or `METRICS` on text.
        tokenizer: tokenizer or processor; needed for text, images and sounds, and for the mask token of a masked model.
        baseline_tokenizer: the baseline's own tokenizer, where the model's vocabulary was pruned. The data is made with
            it, and both models read the same text, each in its own tokens; figures are per token of the model's.
        spec: samples, length and batch size to make batches by, or a task to ask the rows in `data`; or only some of
            these, by name, in place of the usual ones; None: those of the recipe that `data` names.
        seed: of the data and of the bootstrap.
        progress: called with ("evaluate", batches or rows done, all of them).

    Returns:
        {"model": {metric: {"value", "low", "high"}}, "baseline": {...}, "tokens", "sequences", "context", "stride",
        "data", "task", "skipped": {metric: reason}, "seconds"}, with "excess_loss" (nats: mean negative log-likelihood
        minus the baseline's, a paired interval) where both have a perplexity, and "groups" ({metric: {"worst",
        "by_group"}}) where the data has groups. `low` and `high` are the 95% bootstrap interval over sequences or rows,
        None for a single one.

    Raises:
        CalibrationError: the data is empty, does not fit the model, or gives NaN or infinity.
        RecipeError: a metric is unknown.
    """
    started = time.perf_counter()
    check_names(metrics or ())
    own_tokens = baseline is None or baseline_tokenizer is None
    subjects = Subjects(model, baseline, tokenizer, None if own_tokens else baseline_tokenizer)
    with together() as here, _inference(subjects.models), opened_metrics() as known:
        job = _Job(subjects, metrics, known, seed, progress)
        with dense_copies(subjects.models, processes=here.size):
            measured = here.on_first(lambda: job.on_rows(data, spec)) or job.on_batches(data, spec)

        def figures() -> tuple[Observed, dict[str, Any]]:
            observed, wanted = measured.found.observed, measured.metrics
            # Once the dense copies are gone: a packed model is not run with them.
            add_costs(observed, known.columns(wanted), dict(zip(("model", "baseline"), subjects.models, strict=False)))
            return observed, known.figures(observed, wanted, seed)

        observed, result = here.on_first(figures)
    return {
        **result,
        **_excess_loss(observed, "perplexity" in result["baseline"], seed),
        "tokens": sum(observed.data.get("predicted", ())) or sum(observed.data.get("compared", ())),
        "sequences": measured.rows or len(observed.data.get("predicted", observed.data.get("compared", ()))),
        "context": measured.found.context,
        "stride": measured.stride,
        "data": measured.description,
        "task": measured.found.task,
        "seconds": time.perf_counter() - started,
    }


def for_report(result: Mapping[str, Any], speed: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`evaluate_model`'s result, and that of `compare_decode_speed`, in the form `ShrinkReport.evaluation` has."""
    renamed = {"model": "compressed", "baseline": "dense"}
    report = {renamed.get(key, key): value for key, value in result.items()}
    if speed is not None:
        report["speed"] = dict(speed)
    return report


@dataclass(frozen=True)
class _Measured:
    """What came of the data, and which metrics are asked for (None: all that it allows)."""

    found: Pass
    metrics: Sequence[str] | None
    description: str
    rows: int = 0
    stride: int | None = None


@dataclass(frozen=True)
class _Job:
    subjects: Subjects
    metrics: Sequence[str] | None
    known: Metrics
    seed: int
    progress: ProgressCallback | None

    def on_rows(self, data: Any, spec: Spec | None) -> _Measured | None:
        """Ask rows with right answers; None where the data is something else."""
        asked = self._rows(data, spec)
        if asked is None:
            return None
        recipe, task, table = asked
        rows: list[Row] = table.of_task(task, recipe.columns, recipe.samples, self.subjects.model)
        found = ask(task, rows, self.subjects, recipe, self.progress)
        subject = Subject(self.subjects.model, self.subjects.processing, recipe.length)
        wanted = self._explained(found, recipe.metrics, lambda: task.batches(subject, rows))
        return _Measured(found, wanted, table.description, len(rows))

    def on_batches(self, data: Any, spec: Spec | None) -> _Measured:
        """Run over model inputs, made of text or media where they are not given."""
        if isinstance(spec, TaskRecipe):
            raise CalibrationError(f"the task {spec.task} is about rows with right answers, and the data has none")
        asked: EvaluationSpec | None = None if isinstance(spec, Mapping) else spec
        if isinstance(spec, Mapping):
            changed = replace(_usual(data), **given(spec))
            data, asked = (changed, None) if isinstance(data, str | Path) else (data, changed)
        made, spec = ranks().on_first(lambda: self._made(data, asked))
        groups = [one for batch in made.batches for one in _groups(batch)]
        batches = [{k: v for k, v in batch.items() if isinstance(v, torch.Tensor)} for batch in made.batches]
        if not batches or not all(batches):
            raise CalibrationError("the evaluation data has no batches of tensors; give at least one sequence")
        kind = kind_of(self.subjects.model)
        batches = [without_placeholders(kind, batch, self.subjects.model) for batch in batches]
        found = pass_over(self.subjects, kind, batches, self.progress)
        found.observed.groups = groups
        metrics: Sequence[str] | None = METRICS if spec is None else spec.metrics
        if spec is None and "reference" in found.observed.data:
            metrics = None
        wanted = ranks().on_first(lambda: self._explained(found, metrics, lambda: iter(batches)))
        return _Measured(found, wanted, made.description, stride=None if spec is None else spec.stride)

    def _explained(
        self, found: Pass, usual: Sequence[str] | None, examples: Callable[[], Iterator[Batch]]
    ) -> Sequence[str] | None:
        """The metrics that are wanted, once the columns are there that explain decisions on the examples for them."""
        wanted = usual if self.metrics is None else self.metrics
        add_explanations(found.observed, self.known.columns(wanted), self.subjects, examples)
        return wanted

    def _rows(self, data: Any, spec: Spec | None) -> tuple[TaskRecipe, Task, Table] | None:
        if isinstance(data, EvaluationSpec):
            data, spec = data.data, data
        if isinstance(data, str | Path):
            check_data_name(data)
        if isinstance(data, str | Path) and not isinstance(spec, EvaluationSpec | TaskRecipe):
            named = evaluation_spec(data)
            if isinstance(named, TaskRecipe):
                data, spec = None, replace(named, **given_of_rows(spec, str(data)))
        if isinstance(data, TaskRecipe):
            data, spec = None, data
        if isinstance(spec, TaskRecipe):
            return spec, TASKS.build(spec.task, spec.options), table_of(data, spec, self.seed)
        if not _may_be_rows(data):
            return None
        recipe = TaskRecipe("rows", "", samples=None)
        table = table_of(data, recipe, self.seed)
        fitting = fitting_task(self.subjects.model, table.columns)
        if fitting is None:
            return None
        recipe = replace(recipe, task=fitting[0], **given_of_rows(spec, table.description))
        return recipe, fitting[1], table

    def _made(self, data: Any, spec: EvaluationSpec | None) -> tuple[CalibrationData, EvaluationSpec | None]:
        """Batches and what they are in words, and the spec that asked for them."""
        if isinstance(data, list | tuple) and all(isinstance(item, Mapping) for item in data):
            data = CalibrationData([dict(batch) for batch in data], "given batches", {"source": "given"})
        subjects, reader = self.subjects, self.subjects.baseline_processing or self.subjects.processing
        if not isinstance(data, CalibrationData):
            source = None
            if isinstance(data, EvaluationSpec):
                spec = data
            elif isinstance(data, str | Path):
                named = evaluation_spec(data) if spec is None else replace(spec, data=str(data))
                assert isinstance(named, EvaluationSpec)  # the other kind is about rows
                spec = named
            else:
                source = data
            # Text that a model writes itself is written by the dense one: it is the function to keep.
            data = calibration_batches(
                spec or EvaluationSpec(),
                source=source,
                model=subjects.models[-1],
                tokenizer=reader,
                seed=self.seed,
                purpose="evaluation",
                progress=self.progress,
            )
        if spec is not None and spec.stride is not None:
            if kind_of(subjects.model) != "causal":
                raise CalibrationError(f"{type(subjects.model).__name__} does not read on: leave the stride out")
            data = sliding(data, reader, spec.stride, spec.batch_size)
        return data, spec


def _usual(data: Any) -> EvaluationSpec:
    """The spec to change where only some of it is given."""
    named = evaluation_spec(data) if isinstance(data, str | Path) else EvaluationSpec()
    assert isinstance(named, EvaluationSpec)  # the other kind is about rows
    return named


def _may_be_rows(data: Any) -> bool:
    """Whether it could be rows with right answers: raw rows of a data set, of a file or given ones."""
    if isinstance(data, str | Path):
        folder = Path(data).is_dir() and str(data) not in (*recipe_names(), *data_names())
        return Path(data).suffix in ROW_FILES or folder
    if isinstance(data, list | tuple):
        first = data[0] if data else None
        return isinstance(first, Mapping) and not any(isinstance(value, torch.Tensor) for value in first.values())
    return is_data_set(data) and not isinstance(data, dict)


def _groups(batch: Mapping[str, Any]) -> list[Any]:
    groups = batch.get("group", ())
    return groups.tolist() if isinstance(groups, torch.Tensor) else list(groups)


def _excess_loss(observed: Observed, both: bool, seed: int) -> dict[str, Any]:
    if not both:
        return {}
    extra = [own - dense for own, dense in zip(observed.model["nll"], observed.baseline["nll"], strict=True)]
    value, low, high = ratio_interval(extra, observed.data["predicted"], seed)
    return {"excess_loss": {"value": value, "low": low, "high": high}}


@contextmanager
def _inference(models: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Without gradients and in eval mode, with the faster attention; all is as it was afterwards."""
    # Not inference_mode: a tensor that a module caches in there could never be trained on again.
    with modes_kept(*models), torch.no_grad(), grouped_attention(*models):
        for model in models:
            model.eval()
        yield
