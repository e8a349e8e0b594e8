"""report.html: one file that needs nothing else, neither a network nor this package."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from string import Template

import yaml

from hf_shrink.report import ShrinkReport
from hf_shrink.reporting.charts import bit_map, block_error_bars, size_bars
from hf_shrink.reporting.figures import (
    Record,
    bit_grids,
    bits_outside_blocks,
    display_name,
    measured_on,
    rows,
    skipped,
)
from hf_shrink.reporting.style import STYLE

PAGE = Template(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<h1>$title</h1>
$sections
</main>
</body>
</html>
"""
)


def report_html(record: Record, *, name: str | None = None, remarks: Sequence[str] = ()) -> str:
    """The page as text. `remarks` are shown with the run's notes."""
    report = record.report
    sections = [
        f"<p>Made from <code>{escape(record.source)}</code>.</p>",
        _results(report),
        _section("Size", size_bars(report)) if report.bytes_before and report.bytes_after else "",
        _errors(report),
        _bits(record),
        _completions(report),
        _loading(report),
        _details(record, remarks),
    ]
    title = escape(f"{name or display_name(record)}: compression report")
    return PAGE.substitute(title=title, style=STYLE, sections="\n".join(s for s in sections if s))


def _section(title: str, *body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(body) + "\n</section>"


def _results(report: ShrinkReport) -> str:
    lines = []
    for row in rows(report):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in (row.dense, row.compressed, row.change))
        lines.append(f'<tr><th scope="row">{escape(row.name)}<small>{escape(row.hint)}</small></th>{cells}</tr>')
    head = '<tr><td></td><th scope="col">Dense</th><th scope="col">Compressed</th><th scope="col">Change</th></tr>'
    table = (
        f'<div class="scroll" tabindex="0"><table><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table></div>'
    )
    notes = [f"<p>{escape(line)}</p>" for line in (measured_on(report.evaluation), *skipped(report.evaluation))]
    return _section("Result", table if lines else "", *notes)


def _errors(report: ShrinkReport) -> str:
    if not report.block_errors:
        return ""
    text = (
        "<p>Relative squared error of each block's output on the calibration data, compressed against dense, "
        "with the blocks before it compressed too.</p>"
    )
    return _section("Error by block", text, block_error_bars(report.block_errors))


def _bits(record: Record) -> str:
    parts = []
    for grid in bit_grids(record.plan):
        parts += [f"<h3><code>{escape(grid.stack)}</code></h3>", bit_map(grid)]
    outside = bits_outside_blocks(record.plan)
    if outside:
        items = "".join(f"<li><code>{escape(path)}</code>: {bits} bits</li>" for path, bits in outside.items())
        parts.append(f"<p>Outside the blocks:</p><ul>{items}</ul>")
    return _section("Bits", *parts) if parts else ""


def _completions(report: ShrinkReport) -> str:
    titles = {"prompt": "Prompt", "dense": "Dense", "compressed": "Compressed"}
    parts = [
        f"<div><h3>{title}</h3><blockquote>{escape(report.completions[key])}</blockquote></div>"
        for key, title in titles.items()
        if key in report.completions
    ]
    if not parts:
        return ""
    text = "<p>Greedy decoding of one prompt: an illustration, not a measurement.</p>"
    return _section("One completion", text, f'<div class="columns">{"".join(parts)}</div>')


def _loading(report: ShrinkReport) -> str:
    if report.portable:
        return _section("Loading", "<p>Loads in stock transformers.</p>")
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in report.not_portable_because)
    return _section("Loading", f"<p>Loads only after <code>import hf_shrink</code>.</p><ul>{reasons}</ul>")


def _details(record: Record, remarks: Sequence[str]) -> str:
    report = record.report
    recipe = yaml.safe_dump(dict(record.recipe), sort_keys=False)
    parts = [f"<h3>Recipe</h3><pre>{escape(recipe)}</pre>", f"<h3>Plan</h3><pre>{escape(record.plan.summary())}</pre>"]
    notes = [*report.notes, *remarks]
    if notes:
        parts.append("<h3>Notes</h3><ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>")
    if report.seconds:
        lines = "".join(
            f'<tr><th scope="row">{escape(phase)}</th><td>{seconds:,.1f} s</td></tr>'
            for phase, seconds in report.seconds.items()
        )
        parts.append(f"<h3>Time</h3><table><tbody>{lines}</tbody></table>")
    return _section("What was done", *parts)
