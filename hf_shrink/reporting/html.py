"""report.html: one file that needs nothing else, neither a network nor this package."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from hf_shrink.report import ShrinkReport
from hf_shrink.reporting.charts import bar_chart, dot_chart
from hf_shrink.reporting.figures import ADAPTED, Record, display_name, headline, measured_on, rows, said_text, skipped
from hf_shrink.reporting.front_chart import front_figure
from hf_shrink.reporting.headline import tiles_html
from hf_shrink.reporting.layout import BlockLayout
from hf_shrink.reporting.page import bullets, figure, folded, legend, page, paragraph, scrolling, table
from hf_shrink.reporting.plan_chart import by_stack
from hf_shrink.reporting.plan_map import plan_map
from hf_shrink.reporting.plan_rows import outside_rows, plan_rows
from hf_shrink.reporting.reproduce import command, no_command, provenance, seconds, shown_recipe, shown_source
from hf_shrink.reporting.sensitivity import kind_of_option, predicted_by_block, sensitivity_of


def report_html(record: Record, *, name: str | None = None, remarks: Sequence[str] = ()) -> str:
    """The page as text. `remarks` are shown with the run's notes."""
    report = record.report
    sections = [
        ("Result", "Result", _results(report)),
        ("What was done to each block", "Plan", _plan(record)),
        ("What each block is worth", "Sensitivity", _sensitivity(record)),
        ("How far each block is off", "Errors", _errors(report)),
        ("What other sizes cost", "Other sizes", _front(record)),
        ("What both models write", "Samples", _samples(report)),
        ("How to load it", "Loading", _loading(report)),
        ("How to get it again", "Reproduce", _reproduce(record)),
        ("Notes of the run", "Notes", bullets([*report.notes, *remarks]) if report.notes or remarks else ""),
    ]
    version = record.versions.get("hf_shrink")
    footer = f"Made by hf_shrink{f' {version}' if version else ''}. This page loads nothing from anywhere."
    return page("Compression report", name or display_name(record), _lede(record), sections, footer)


def _lede(record: Record) -> str:
    said = headline(record.report)
    source = f"Made from <code>{escape(shown_source(record))}</code>"
    return f'<p class="lede">{source}{": " if said else ""}{escape(said)}.</p>'


def _results(report: ShrinkReport) -> str:
    found = rows(report)
    notes = [paragraph(line, "note") for line in (measured_on(report.evaluation), *skipped(report.evaluation))]
    if not found:
        return "".join(notes)
    shown = [[escape(row.name), *map(_with_interval, (row.dense, row.compressed, row.change))] for row in found]
    heads = ("", "Dense", "Compressed", "Change")
    figures = table("Dense beside compressed", heads, shown, html=True, kind="wide")
    meanings = "".join(f"<dt>{escape(row.name)}</dt><dd>{escape(row.hint)}</dd>" for row in found if row.hint)
    return "".join(
        [
            tiles_html(report),
            scrolling(figures, "Dense beside compressed"),
            *notes,
            folded("What the figures mean", f'<dl class="meanings">{meanings}</dl>'),
        ]
    )


def _with_interval(text: str) -> str:
    """A figure whose interval can go to a line of its own."""
    return re.sub(r" ?(\[[^]]*\])", r' <span class="interval">\1</span>', escape(text))


def _plan(record: Record) -> str:
    plan = record.plan
    layout = [BlockLayout(**block) for block in record.report.layout]
    parts = []
    stacks = by_stack(plan_rows(plan, layout))
    for stack, found in stacks.items():
        text = (
            "A column for each block of the dense model; lines for the bits of its matrices and for what is kept of it."
        )
        title = f"Stack {stack}. {text}" if len(stacks) > 1 else text
        parts.append(figure(title, plan_map(found)))
    outside = [f"{path}: {bits} bits" for path, bits, _ in outside_rows(plan, layout)] if layout else []
    if outside:
        parts.append(f"<p>Outside the blocks:</p>{bullets(outside)}")
    return "".join(parts) + folded("The plan in words", f"<pre>{escape(plan.summary())}</pre>")


def _sensitivity(record: Record) -> str:
    found = sensitivity_of(record.plan)
    if found is None:
        return _predicted(record)
    blocks, numbers = found.blocks, found.numbers
    series = {name: (kind_of_option(name), values) for name, values in found.options.items()}
    text = (
        f"What each of {len(blocks)} blocks would cost under {', '.join(series)}, in nats of KL divergence to the "
        "dense model, on a logarithmic axis."
    )
    cells = [[path, *(f"{values[i]:.3g}" for values in found.options.values())] for i, path in enumerate(blocks)]
    caption = (
        "KL divergence to the dense model, in nats, if only this block were stored so: predicted before planning, and "
        "corrected by what trials measured."
    )
    picture = dot_chart(numbers, series, text) + legend((kind, name) for name, (kind, _) in series.items())
    return figure(caption, picture, table("Nats by block", ("Block", *series), cells))


def _predicted(record: Record) -> str:
    found = predicted_by_block(record.plan)
    if not found or max(found.values()) <= 0:
        return ""
    worst = max(found, key=lambda path: found[path])
    text = f"Predicted cost of what is done to {len(found)} blocks; the largest is {found[worst]:.3g} at {worst}."
    caption = "What the changes to each block were predicted to cost while planning."
    return figure(caption, bar_chart(found, text, "other"), _numbers("Predicted cost", found))


def _errors(report: ShrinkReport) -> str:
    errors = report.block_errors
    if not errors:
        return ""
    worst = max(errors, key=lambda path: errors[path])
    text = f"Relative squared output error of {len(errors)} blocks; the largest is {errors[worst]:.3g} at {worst}."
    caption = (
        "Relative squared error of each block's output on the calibration data, compressed against dense, with the "
        "blocks before it compressed too."
    )
    return figure(caption, bar_chart(errors, text), _numbers("Relative squared error", errors))


def _numbers(what: str, values: dict[str, float]) -> str:
    return table(f"{what} by block", ("Block", what), [[path, f"{value:.4g}"] for path, value in values.items()])


def _front(record: Record) -> str:
    front = record.plan.search.get("front")
    return front_figure(front) if front else ""


def _samples(report: ShrinkReport) -> str:
    parts = []
    for number, texts in enumerate(report.completions, 1):
        sides = "".join(
            f"<div><h4>{title}</h4><blockquote>{escape(said_text(texts[key]))}</blockquote></div>"
            for key, title in (("dense", "Dense"), ("compressed", "Compressed"))
        )
        parts.append(f"<h3>Prompt {number}</h3><blockquote>{escape(texts['prompt'])}</blockquote>")
        parts.append(f'<div class="columns">{sides}</div>')
    return paragraph("Greedy decoding: an illustration, not a measurement.") + "".join(parts) if parts else ""


def _loading(report: ShrinkReport) -> str:
    adapted = paragraph(ADAPTED) if report.adapter else ""
    if report.portable:
        return adapted + paragraph(f"{'The weights alone load' if report.adapter else 'Loads'} in stock transformers.")
    return (
        adapted
        + f"<p>Loads only after <code>import hf_shrink</code>, because:</p>{bullets(report.not_portable_because)}"
    )


def _reproduce(record: Record) -> str:
    recipe, again = shown_recipe(record), command(record)
    where = "<p>From beside this page, where <code>shrink.json</code> holds recipe and plan:</p>"
    parts = [f"{where}<pre>{escape(again)}</pre>" if again else paragraph(no_command(record))]
    if recipe:
        parts.append(f"<h3>Recipe</h3><pre>{escape(recipe)}</pre>")
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in provenance(record).items())
    parts.append(f'<h3>Provenance</h3><dl class="meanings">{lines}</dl>')
    spent = record.report.seconds
    if spent:
        cells = [[phase, seconds(amount)] for phase, amount in spent.items()]
        parts.append(folded("How long it took", table("Wall time by phase", ("Phase", "Time"), cells)))
    return "".join(parts)
