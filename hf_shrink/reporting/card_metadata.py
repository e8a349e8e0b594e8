"""The front matter of a model card: what the Hub reads of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hf_shrink.plan import Plan
from hf_shrink.report import ShrinkReport
from hf_shrink.reporting.figures import Record, metric_row, number
from hf_shrink.reporting.reproduce import is_hub_id
from hf_shrink.reporting.source_card import SourceCard, on_hub
from hf_shrink.reporting.tasks import Task

CONFIDENCE = 0.95  # of the intervals that reports hold


def card_metadata(record: Record, name: str, task: Task, source: SourceCard) -> ModelCardData:
    """Licence, languages and the like from the source; base model, tags and measured results of our own."""
    plan, kept = record.plan, source.inherited
    if task.tag is not None:
        kept.setdefault("pipeline_tag", task.tag)
    if is_hub_id(record.source):
        if "license_link" in kept:
            kept["license_link"] = on_hub(str(kept["license_link"]), record.source)
        # The Hub knows quantized, finetune, adapter and merge; a pruned model is nearest to a finetune.
        relation = "quantized" if plan.bits else "finetune"
        kept |= {"base_model": record.source, "base_model_relation": relation}
    elif source.metadata.get("base_model"):  # a model of this machine, made from one of the Hub
        kept |= {"base_model": source.metadata["base_model"], "base_model_relation": "finetune"}
    return ModelCardData(
        model_name=name,
        library_name="transformers",
        tags=[*_tags(plan), *source.tags],
        eval_results=eval_results(record.report, kept.get("pipeline_tag") or "other") or None,
        **kept,
    )


def eval_results(report: ShrinkReport, task: str) -> list[EvalResult]:
    """The compressed model's figures; the interval of each stands in its name and, for machines, in `metric_args`."""
    evaluation = report.evaluation
    data = str(evaluation.get("data", "unnamed data"))
    slug = re.sub(r"[^a-z0-9]+", "-", data.lower()).strip("-")[:60].rstrip("-") or "unnamed"
    about = {key: evaluation[key] for key in ("tokens", "sequences", "context") if evaluation.get(key)}
    return [
        EvalResult(
            task_type=task,
            dataset_type=slug,
            dataset_name=data,
            dataset_args=about or None,
            metric_type=key,
            metric_name=metric_row(key)[0] + _interval(value),
            metric_value=round(number(value), 6),
            metric_args=_bounds(value) or None,
        )
        for key, value in evaluation.get("compressed", {}).items()
    ]


def _interval(value: Any) -> str:
    bounds = _bounds(value)
    return f" ({CONFIDENCE:.0%} interval {bounds['low']:.4g} to {bounds['high']:.4g})" if bounds else ""


def _bounds(value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping) or value.get("low") is None or value.get("high") is None:
        return {}
    return {"confidence_level": CONFIDENCE, "low": round(value["low"], 6), "high": round(value["high"], 6)}


def _tags(plan: Plan) -> list[str]:
    tags = ["hf_shrink"]
    if plan.bits:
        tags += ["quantized", "bitsandbytes" if plan.formats else "compressed-tensors"]
        tags += [f"{bits}-bit" for bits in sorted(set(plan.bits.values()))]
        names = {scheme.name for scheme in plan.schemes.values()}
        tags += [tag for name, tag in (("W8A8", "w8a8"), ("FP8A16", "fp8")) if name in names]
    if plan.prunes or plan.vocabulary is not None or plan.weights is not None:
        tags.append("pruned")
    if plan.weights is not None:
        tags.append("sparse")
    return tags
