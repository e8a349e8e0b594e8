"""One pass over held-out data with the dense and the compressed model side by side."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hf_shrink.calibration.data import CalibrationData, calibration_batches
from hf_shrink.calibration.inputs import tokenizer_of
from hf_shrink.calibration.targets import (
    Batch,
    Hidden,
    Kind,
    Logits,
    cut_by_rows,
    kind_of,
    without_placeholders,
)
from hf_shrink.errors import CalibrationError, RecipeError
from hf_shrink.evaluation.apart import add_apart
from hf_shrink.evaluation.bootstrap import ratio_interval
from hf_shrink.evaluation.divergence import Totals
from hf_shrink.evaluation.metrics import NAMES, load_metric
from hf_shrink.evaluation.recipes import evaluation_spec
from hf_shrink.evaluation.scored import Task, device_of, forward, length_of
from hf_shrink.progress import ProgressCallback
from hf_shrink.recipe import METRICS, EvaluationSpec
from hf_shrink.registry import did_you_mean
from hf_shrink.sharding import ranks, share, together

# Logits of one forward pass and model, in elements: sequences go in one by one where a batch would make more.
LOGITS = {"cpu": 2**25, "accelerator": 2**28}
TASKS = {"causal": "text-generation", "masked": "fill-mask", "seq2seq": "text2text-generation"}


def evaluate_model(
    model: Any,
    data: Any,
    *,
    baseline: Any = None,
    metrics: Sequence[str] = METRICS,
    tokenizer: Any = None,
    baseline_tokenizer: Any = None,
    spec: EvaluationSpec | None = None,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Measure a model, and how far it is from its dense `baseline`, on held-out data.

    Causal models predict each window's next tokens (the first of a window is not predicted, windows are independent);
    encoder-decoders the decoder's; masked models 15% of the tokens, masked with a fixed seed, which makes perplexity
    a pseudo-perplexity. Models with class logits are compared on those; models without any logits by the cosine of
    their last hidden states. Padding and labels of -100 never count. Logits are not kept beyond a few sequences;
    log-softmax is float32 and sums are float64.

    In processes that accelerate or torchrun started, all of them call this on the same models; they share the batches.

    Args:
        model: the compressed model.
        data: a CalibrationData; a list of dicts of tensors; what `evaluation_spec` reads: a built-in name such as
            "self", or the path of a .txt, .jsonl or .parquet file; or a list of texts or a `datasets.Dataset`.
        baseline: the dense model; without one there is only perplexity.
        metrics: of "perplexity", "kl_divergence", "top1_agreement" and "cosine".
        tokenizer: needed for text, and for the mask token of a masked language model.
        baseline_tokenizer: the baseline's own tokenizer, where the model's vocabulary was pruned. The data is made with
            it, and both models read the same text, each in its own tokens; figures are per token of the model's.
        spec: samples, length and batch size to make batches by; None: those of the recipe that `data` names.
        seed: of the data and of the bootstrap.
        progress: called with ("evaluate", batches done, batches).

    Returns:
        {"model": {metric: {"value", "low", "high"}}, "baseline": {...}, "tokens", "sequences", "context", "data",
        "task", "skipped": {metric: reason}, "seconds"}, with "excess_loss" (nats: mean negative log-likelihood minus
        the baseline's, a paired interval) where both have a perplexity. `low` and `high` are the 95% bootstrap
        interval over sequences, None for a single one.

    Raises:
        CalibrationError: the data is empty, does not fit the model, or gives NaN or infinity.
        RecipeError: a metric is unknown.
    """
    started = time.perf_counter()
    for name in metrics:
        if name not in NAMES:
            raise RecipeError(f"unknown metric {name!r}; {did_you_mean(name, NAMES)}")
    own_tokens = baseline is None or baseline_tokenizer is None
    maker = tokenizer if own_tokens else baseline_tokenizer
    kind = kind_of(model)
    task = Task.of(kind, model, tokenizer)
    totals, context = Totals(), 0
    with together(), _inference([m for m in (model, baseline) if m is not None]):
        batches, description = ranks().on_first(lambda: _batches(data, spec, model, baseline, maker, seed, progress))
        batches = [without_placeholders(kind, batch, model) for batch in batches]
        tokenizers = tokenizer_of(tokenizer), tokenizer_of(baseline_tokenizer)
        shared = share(len(batches))
        found: list[tuple[Totals, int]] = []
        for number, batch in enumerate(task.prepared(batches) if own_tokens else batches):
            if number not in shared.own:
                continue
            own = Totals()
            if own_tokens:
                for part in cut_by_rows(batch, _rows(model, kind, batch)):
                    _add(own, kind, part, model, baseline)
                found.append((own, length_of(batch)))
            else:
                found.append((own, add_apart(own, task, batch, (model, baseline), tokenizers)))
            if progress is not None:
                progress("evaluate", len(found), len(shared.own))
        for own, length in shared.gather(found):
            totals.extend(own)
            context = max(context, length)
    result = _figures(totals, tuple(metrics), _reasons(totals, kind, task, model, baseline is not None), seed)
    return {
        **result,
        "tokens": sum(totals.predicted) or sum(totals.compared),
        "sequences": len(totals.predicted) or len(totals.compared),
        "context": context,
        "data": description,
        "task": TASKS.get(kind) or ("feature-extraction" if totals.cosine else "classification"),
        "seconds": time.perf_counter() - started,
    }


def for_report(result: Mapping[str, Any], speed: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`evaluate_model`'s result, and that of `compare_decode_speed`, in the form `ShrinkReport.evaluation` has."""
    renamed = {"model": "compressed", "baseline": "dense"}
    report = {renamed.get(key, key): value for key, value in result.items()}
    if speed is not None:
        report["speed"] = dict(speed)
    return report


def _batches(
    data: Any,
    spec: EvaluationSpec | None,
    model: Any,
    baseline: Any,
    tokenizer: Any,
    seed: int,
    progress: ProgressCallback | None,
) -> tuple[list[Batch], str]:
    """The batches as dicts of tensors, and what they are in words."""
    if isinstance(data, list | tuple) and all(isinstance(item, Mapping) for item in data):
        data = CalibrationData([dict(batch) for batch in data], "given batches")
    if not isinstance(data, CalibrationData):
        source = None
        if isinstance(data, EvaluationSpec):
            spec = data
        elif isinstance(data, str | Path):
            spec = evaluation_spec(data) if spec is None else replace(spec, data=str(data))
        else:
            source = data
        # Text that a model writes itself is written by the dense one: it is the function to keep.
        author = baseline if baseline is not None else model
        data = calibration_batches(
            spec or EvaluationSpec(),
            source=source,
            model=author,
            tokenizer=tokenizer,
            seed=seed,
            purpose="evaluation",
            progress=progress,
        )
    made = [{key: value for key, value in batch.items() if isinstance(value, torch.Tensor)} for batch in data.batches]
    if not made or not all(made):
        raise CalibrationError("the evaluation data has no batches of tensors; give at least one sequence")
    return made, data.description


def _add(totals: Totals, kind: Kind, batch: Batch, model: Any, baseline: Any) -> None:
    own = forward(kind, batch, model)
    dense = None if baseline is None else forward(kind, batch, baseline)
    if isinstance(own, Logits):
        totals.add_logits(own, dense if isinstance(dense, Logits) else None)
    elif isinstance(dense, Hidden):
        totals.add_hidden(own, dense)


def _rows(model: Any, kind: Kind, batch: Batch) -> int:
    """How many sequences go through at once, so that their logits fit `LOGITS`."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    vocabulary: int | None = getattr(text, "vocab_size", None)
    if kind == "other" or vocabulary is None:
        return len(next(iter(batch.values())))
    target = batch.get("decoder_input_ids", batch.get("labels", batch.get("input_ids")))
    length = target.shape[1] if target is not None and target.dim() == 2 else 1
    return max(1, LOGITS["cpu" if device_of(model).type == "cpu" else "accelerator"] // (length * vocabulary))


@contextmanager
def _inference(models: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Without gradients and in eval mode; each module's mode is as it was afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        # Not inference_mode: a tensor that a module caches in there could never be trained on again.
        with torch.no_grad():
            for model in models:
                model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _reasons(totals: Totals, kind: Kind, task: Task, model: Any, compared: bool) -> dict[str, str]:
    """Why a metric cannot be given, by metric."""
    name = type(model).__name__
    reasons: dict[str, str] = {}
    if not sum(totals.predicted):
        reasons["perplexity"] = f"{name} predicts no tokens"
        if kind == "masked" and task.mask_id is None:
            reasons["perplexity"] = "a masked model needs its tokenizer's mask token; pass tokenizer="
    if not totals.divergence:
        reason = "needs the dense model as baseline"
        if compared:
            reason = f"{name} puts out hidden states and no distribution; cosine is given instead"
            if not totals.cosine:
                reason = "the two models put out different numbers of classes"
        reasons["kl_divergence"] = reasons["top1_agreement"] = reason
    if not totals.cosine:
        reasons["cosine"] = f"{name} has logits, which say more" if compared else "needs the dense model as baseline"
    return reasons


def _figures(totals: Totals, wanted: tuple[str, ...], reasons: Mapping[str, str], seed: int) -> dict[str, Any]:
    """The metrics that `wanted` names and the totals allow, by model."""
    if totals.cosine and "cosine" not in wanted and {"kl_divergence", "top1_agreement"} & set(wanted):
        wanted = (*wanted, "cosine")
    inputs = {
        "perplexity": (totals.nll, totals.predicted),
        "kl_divergence": (totals.divergence, totals.compared),
        "top1_agreement": (totals.agreeing, totals.compared),
        "cosine": (totals.cosine, totals.compared),
    }
    figures: dict[str, Any] = {"model": {}, "baseline": {}, "skipped": {}}
    with tempfile.TemporaryDirectory(prefix="hf_shrink_metrics_") as cache:
        for name in wanted:
            if name in reasons:
                figures["skipped"][name] = reasons[name]
                continue
            figures["model"][name] = _compute(name, *inputs[name], seed, cache)
            if name == "perplexity" and totals.baseline_nll:
                figures["baseline"][name] = _compute(name, totals.baseline_nll, totals.predicted, seed, cache)
    if "perplexity" in figures["baseline"]:
        extra = [own - dense for own, dense in zip(totals.nll, totals.baseline_nll, strict=True)]
        figures["excess_loss"] = dict(
            zip(("value", "low", "high"), ratio_interval(extra, totals.predicted, seed), strict=True)
        )
    return figures


def _compute(name: str, sums: list[float], counts: list[int], seed: int, cache: str) -> dict[str, float | None]:
    result = load_metric(name, cache).compute(predictions=sums, references=counts, seed=seed)
    return {"value": result[name], "low": result["low"], "high": result["high"]}
