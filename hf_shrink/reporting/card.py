"""The model card: README.md with metadata that the Hub reads. No claim without a figure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hf_shrink.report import ShrinkReport
from hf_shrink.reporting.card_metadata import card_metadata
from hf_shrink.reporting.figures import (
    ADAPTED,
    NOT_MEASURED,
    Record,
    display_name,
    figure,
    headline,
    measured_on,
    number,
    rows,
    said_text,
    skipped,
)
from hf_shrink.reporting.pictures import Picture
from hf_shrink.reporting.reproduce import (
    command,
    is_hub_id,
    no_command,
    provenance,
    seconds,
    shown_recipe,
    shown_source,
)
from hf_shrink.reporting.source_card import SourceCard
from hf_shrink.reporting.tasks import Task, task_of

DENSE_CARD = "README.dense.md"  # the dense model's card, whole, beside ours


def model_card(
    record: Record,
    *,
    config: Mapping[str, Any] | None = None,
    source_card: str | None = None,
    name: str | None = None,
    pictures: Sequence[Picture] = (),
) -> str:
    """README.md for a compressed checkpoint.

    Args:
        record: source, recipe, plan and report of the run.
        config: the checkpoint's config.json, for the class that loads it.
        source_card: the text of the dense model's README.md: what its authors say of licence, languages, use and limits
            is taken over.
        name: of this model; None: the source's last part and the recipe's name.
        pictures: that lie beside the card.
    """
    name = name or display_name(record)
    source = SourceCard.of(source_card)
    task = task_of((config or {}).get("architectures"), record.report.evaluation.get("task"))
    sections = [
        f"---\n{card_metadata(record, name, task, source).to_yaml()}\n---",
        f"# {name}",
        _opening(record),
        _results(record.report, pictures),
        _loading(record, task, name),
        _done(record, pictures),
        _completions(record.report),
        _limits(record, source),
        _carried(record, source, bool(source_card)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _opening(record: Record) -> str:
    source = f"A local model (`{shown_source(record)}`)"
    if is_hub_id(record.source):
        source = f"[{record.source}](https://huggingface.co/{record.source})"
    said = headline(record.report)
    return f"{source}, compressed with hf_shrink{f': {said}' if said else ''}."


def _results(report: ShrinkReport, pictures: Sequence[Picture]) -> str:
    lines = ["## What it costs", ""]
    found = rows(report)
    lines += [*_in_words(report.evaluation)]
    if found:
        lines += ["| | Dense | Compressed | Change |", "|---|---:|---:|---:|"]
        lines += [f"| {r.name} | {r.dense} | {r.compressed} | {r.change or NOT_MEASURED} |" for r in found]
        lines.append("")
    lines += [measured_on(report.evaluation), *skipped(report.evaluation), ""]
    lines += [f"- {row.name}: {row.hint}." for row in found if row.hint]
    return "\n".join([*lines, *_shown(pictures, "size", "front")]).rstrip()


def _in_words(evaluation: Mapping[str, Any]) -> list[str]:
    """What the model loses, as a sentence, where both models have a perplexity."""
    dense, compressed = (evaluation.get(key, {}).get("perplexity") for key in ("dense", "compressed"))
    if dense is None or compressed is None or evaluation.get("excess_loss") is None:
        return []
    sentence = f"Perplexity is {number(compressed):.4g}, the dense model's {number(dense):.4g}"
    return [f"{sentence}: {figure(evaluation['excess_loss'])} nats a token more on the same text.", ""]


def _loading(record: Record, task: Task, name: str) -> str:
    report = record.report
    lines = ["## How to load it", "", "```python"]
    if not report.portable:
        lines.append("import hf_shrink  # teaches transformers this checkpoint's format")
    elif report.adapter:
        lines.append("import hf_shrink  # puts the adapter on")
    writes = task.auto_class == "AutoModelForCausalLM"
    lines += [
        f"from transformers import {task.auto_class}{', AutoTokenizer' if writes else ''}",
        "",
        f'name = "{name}"  # the folder\'s path, or its id on the Hub',
        f"model = {task.auto_class}.from_pretrained(name)",
    ]
    if report.adapter:
        lines.append('model = hf_shrink.load_adapter(model, name, subfolder="adapter")')
    if writes:
        lines += [
            "tokenizer = AutoTokenizer.from_pretrained(name)",
            'inputs = tokenizer("The sea", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))",
        ]
    lines += ["```", ""]
    if report.adapter:
        lines.append(ADAPTED)
    if report.adapter and report.portable:
        lines.append("The weights alone load in stock transformers.")
    elif record.plan.formats:
        lines.append("It loads in stock transformers with bitsandbytes installed; hf_shrink is not needed.")
    elif report.portable:
        lines.append("It loads in stock transformers; hf_shrink is not needed.")
        if record.plan.schemes:
            lines.append("With `import hf_shrink` before, weights stay packed in memory and use its kernels.")
    else:
        lines.append("It does not load without `import hf_shrink`, because:")
        lines += ["", *(f"- {reason}" for reason in report.not_portable_because or ["see the notes below"])]
    return "\n".join(lines)


def _done(record: Record, pictures: Sequence[Picture]) -> str:
    lines = ["## What was done", ""]
    recipe = shown_recipe(record)
    if recipe:
        lines += ["The recipe:", "", _fenced(recipe, "yaml"), ""]
    lines += ["What it came to:", "", _fenced(record.plan.summary(), "text")]
    lines += _shown(pictures, "plan", "sensitivity", "block_errors")
    if record.report.notes:
        lines += ["", "Notes of the run:", "", *(f"- {_one_line(note)}" for note in record.report.notes)]
    again = command(record)
    lines += (
        ["", "The same again, from beside this card:", "", _fenced(again, "bash")]
        if again
        else ["", no_command(record)]
    )
    lines.append("")
    lines += [f"- {name}: {_one_line(value)}" for name, value in provenance(record).items()]
    total = record.report.seconds.get("total")
    if total is not None:
        lines.append(f"- Time: {seconds(total)}")
    return "\n".join(lines)


def _completions(report: ShrinkReport) -> str:
    if not report.completions:
        return ""
    lines = ["## What both models write", "", "Greedy decoding: an illustration, not a measurement."]
    for texts in report.completions:
        for key, title in (("prompt", "Prompt"), ("dense", "Dense"), ("compressed", "Compressed")):
            lines += ["", f"{title}:", "", _fenced(said_text(texts[key]), "text")]
    return "\n".join(lines)


def _limits(record: Record, source: SourceCard) -> str:
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
    if "license" not in source.inherited:
        lines.append("- The dense model's license was not found; it applies to this model as well.")
    return "\n".join(lines)


def _carried(record: Record, source: SourceCard, whole: bool) -> str:
    """What the dense model's authors say, in their words."""
    hub_id = record.source if is_hub_id(record.source) else None
    said = source.markdown(hub_id, depth=3)
    if not whole:
        return ""
    lines = ["## From the dense model's card", ""]
    where = f"[{DENSE_CARD}]({DENSE_CARD}) holds all of it."
    if not said:
        return "\n".join([*lines, where])
    return "\n".join([*lines, f"Its authors' words, written of the dense model; {where}", "", said])


def _shown(pictures: Sequence[Picture], *names: str) -> list[str]:
    """Pictures by name, those that there are."""
    found = {re.sub(r".*/|\.png", "", picture.path): picture for picture in pictures}
    return [line for name in names if name in found for line in ("", f"![{found[name].text}]({found[name].path})")]


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
