"""The model card: README.md with metadata that the Hub reads. No claim without a figure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard import RepoCard

from hf_shrink.plan import Plan
from hf_shrink.report import ShrinkReport
from hf_shrink.reporting.figures import (
    NOT_MEASURED,
    Record,
    display_name,
    measured_on,
    metric_name,
    number,
    rows,
    size,
    skipped,
)
from hf_shrink.reporting.tasks import Task, task_of

# What a compressed model keeps of its source's metadata.
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag", "datasets", "extra_gated_prompt")


def model_card(
    record: Record, *, config: Mapping[str, Any] | None = None, source_card: str | None = None, name: str | None = None
) -> str:
    """README.md for a compressed checkpoint.

    Args:
        record: source, recipe, plan and report of the run.
        config: the checkpoint's config.json, for the class that loads it.
        source_card: the text of the dense model's README.md, for what is inherited, the license above all.
        name: of this model; None: the source's last part and the recipe's name.
    """
    name = name or display_name(record)
    inherited = _metadata_of(source_card)
    task = task_of((config or {}).get("architectures"), record.report.evaluation.get("task"))
    data = _metadata(record, name, task, inherited)
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        _opening(record),
        _results(record.report),
        _loading(record.report, task, name, bool(record.plan.formats)),
        _done(record),
        _completions(record.report),
        _limits(record, inherited),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def is_hub_id(source: str) -> bool:
    """Whether a source is named as on the Hub, `owner/name`, and is no folder here."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None and source[0] != "." and not Path(source).exists()


def _metadata_of(card: str | None) -> dict[str, Any]:
    """The front matter of a card; empty where there is none. A broken one is not worth failing a finished run for."""
    if not card:
        return {}
    try:
        return dict(vars(RepoCard(card, ignore_metadata_errors=True).data))
    except (ValueError, yaml.YAMLError):
        return {}


def _metadata(record: Record, name: str, task: Task, inherited: Mapping[str, Any]) -> ModelCardData:
    plan, report = record.plan, record.report
    kept = {key: inherited[key] for key in INHERITED if inherited.get(key) is not None}
    if task.tag is not None:
        kept.setdefault("pipeline_tag", task.tag)
    if is_hub_id(record.source):
        kept["base_model"] = record.source
        # The Hub knows quantized, finetune, adapter and merge; a pruned model is nearest to a finetune.
        kept["base_model_relation"] = "quantized" if plan.bits else "finetune"
    return ModelCardData(
        model_name=name,
        library_name="transformers",
        tags=_tags(plan),
        eval_results=_eval_results(report, kept.get("pipeline_tag", "other")) or None,
        **kept,
    )


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


def _eval_results(report: ShrinkReport, task: str) -> list[EvalResult]:
    data = str(report.evaluation.get("data", "unnamed data"))
    slug = re.sub(r"[^a-z0-9]+", "-", data.lower()).strip("-")[:60] or "unnamed"
    return [
        EvalResult(
            task_type=task,
            dataset_type=slug,
            dataset_name=data,
            metric_type=key,
            metric_name=metric_name(key),
            metric_value=round(number(value), 6),
        )
        for key, value in report.evaluation.get("compressed", {}).items()
    ]


def _opening(record: Record) -> str:
    report = record.report
    # Of a folder only the name: its path is nobody else's business.
    source = f"A local model (`{Path(record.source).name}`)"
    if is_hub_id(record.source):
        source = f"[{record.source}](https://huggingface.co/{record.source})"
    text = f"{source}, compressed with hf_shrink"
    if report.bytes_before and report.bytes_after:
        text += f" from {size(report.bytes_before)} to {size(report.bytes_after)} ({report.compression:.2f}x smaller)"
    return text + "."


def _results(report: ShrinkReport) -> str:
    lines = ["## What it costs", ""]
    found = rows(report)
    if found:
        lines += ["| | Dense | Compressed | Change |", "|---|---:|---:|---:|"]
        lines += [f"| {r.name} | {r.dense} | {r.compressed} | {r.change or NOT_MEASURED} |" for r in found]
        lines.append("")
        lines += [f"- {row.name}: {row.hint}." for row in found]
        lines.append("")
    lines.append(measured_on(report.evaluation))
    lines += skipped(report.evaluation)
    return "\n".join(lines)


def _loading(report: ShrinkReport, task: Task, name: str, bitsandbytes: bool) -> str:
    lines = ["## How to load it", "", "```python"]
    if not report.portable:
        lines.append("import hf_shrink  # teaches transformers this checkpoint's format")
    lines += [
        f"from transformers import {task.auto_class}",
        "",
        f'model = {task.auto_class}.from_pretrained("{name}")  # the folder\'s path, or its id on the Hub',
        "```",
        "",
    ]
    if bitsandbytes:
        lines.append("It loads in stock transformers with bitsandbytes installed; hf_shrink is not needed.")
    elif report.portable:
        lines.append("It loads in stock transformers; hf_shrink is not needed.")
    else:
        lines.append("It does not load without `import hf_shrink`, because:")
        lines += ["", *(f"- {reason}" for reason in report.not_portable_because or ["see the notes below"])]
    return "\n".join(lines)


def _done(record: Record) -> str:
    recipe = yaml.safe_dump(dict(record.recipe), sort_keys=False, default_flow_style=None).rstrip()
    lines = ["## What was done", ""]
    if record.recipe:
        lines += [f"The recipe (seed {record.report.seed}):", "", _fenced(recipe, "yaml"), ""]
    lines += ["What it came to:", "", _fenced(record.plan.summary(), "text")]
    if record.report.notes:
        lines += ["", "Notes of the run:", "", *(f"- {_one_line(note)}" for note in record.report.notes)]
    total = record.report.seconds.get("total")
    if total is not None:
        lines += ["", f"The run took {total:,.0f} seconds."]
    return "\n".join(lines)


def _completions(report: ShrinkReport) -> str:
    texts = report.completions
    if not texts:
        return ""
    lines = ["## One completion", "", "Greedy decoding, one prompt: an illustration, not a measurement."]
    for key, title in (("prompt", "Prompt"), ("dense", "Dense"), ("compressed", "Compressed")):
        if key in texts:
            lines += ["", f"{title}:", "", _fenced(texts[key], "text")]
    return "\n".join(lines)


def _limits(record: Record, inherited: Mapping[str, Any]) -> str:
    evaluation = record.report.evaluation
    lines = ["## Limits", ""]
    if evaluation.get("compressed"):
        data = evaluation.get("data", "the data above")
        lines.append(f"- The figures hold for {data}; other languages, tasks and lengths were not measured.")
    else:
        lines.append("- No figure of quality exists for this model; measure it with `hf-shrink evaluate` before use.")
    calibration = record.report.calibration.get("description")
    if calibration:
        lines.append(f"- Calibrated on {calibration}. What that does not cover may have lost more.")
    if "speed" not in evaluation:
        lines.append("- Speed was not measured.")
    lines.append("- Whatever the dense model's own card warns of holds for this one too.")
    if "license" not in inherited:
        lines.append("- The dense model's license was not found; it applies to this model as well.")
    return "\n".join(lines)


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
