"""The result in the terminal: dense beside compressed."""

from __future__ import annotations

import sys
from io import StringIO
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_shrink.report import ShrinkReport
from hf_shrink.reporting.figures import measured_on, rows, skipped

PLAIN_WIDTH = 120


def print_table(report: ShrinkReport, *, title: str = "", file: TextIO | None = None) -> None:
    """Print what was measured to `file` (stdout): in colour on a terminal, as plain ASCII lines elsewhere."""
    file = file if file is not None else sys.stdout
    console, table = console_for(file), empty_table(file, title)
    table.add_column("")
    table.add_column("Dense", justify="right")
    table.add_column("Compressed", justify="right", style="bold" if file.isatty() else "")
    table.add_column("Change", justify="right")
    for row in rows(report):
        table.add_row(*(Text(part) for part in (row.name, row.dense, row.compressed, row.change)))
    if table.row_count:
        console.print(table)
    for line in (measured_on(report.evaluation), *skipped(report.evaluation)):
        console.print(Text(line))
    if not report.portable:
        reasons = "; ".join(report.not_portable_because) or "see the notes"
        console.print(Text(f"Loads only after `import hf_shrink`: {reasons}"))


def console_for(file: TextIO, width: int = PLAIN_WIDTH) -> Console:
    """In colour on a terminal; elsewhere there is no width to go by, and a fixed one keeps logs alike."""
    return Console(file=file) if file.isatty() else Console(file=file, width=width, no_color=True)


def empty_table(file: TextIO, title: str) -> Table:
    """A table to add columns and rows to, drawn in ASCII where `file` is no terminal."""
    return Table(
        title=Text(title) if title else None,
        title_justify="left",
        box=box.SIMPLE_HEAVY if file.isatty() else box.ASCII2,
        pad_edge=False,
    )


def plain_table(report: ShrinkReport, *, title: str = "") -> str:
    """The same as text."""
    buffer = StringIO()
    print_table(report, title=title, file=buffer)
    return buffer.getvalue()
