"""A plan in the terminal: a line a block, in colours where there are some, with a bar for the predicted damage."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from io import StringIO
from typing import TextIO

from rich import box
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from hf_shrink.architectures.binding import Binding
from hf_shrink.plan import Plan
from hf_shrink.reporting.layout import layout_of
from hf_shrink.reporting.palette import KEPT, ink_on, level_of_bits
from hf_shrink.reporting.plan_rows import UNITS, PlanRow, outside_rows, plan_rows

PLAIN_WIDTH = 120
BAR = 10  # characters of the longest bar
PARTS = {"attention": "attention", "cross_attention": "cross", "mlp": "MLP", "experts": "experts", "others": "others"}


def print_plan(plan: Plan, binding: Binding, *, file: TextIO | None = None) -> None:
    """Print a plan block by block to `file` (stdout): colours on a terminal, plain ASCII lines elsewhere."""
    file = file if file is not None else sys.stdout
    colours = file.isatty()
    console = Console(file=file) if colours else Console(file=file, width=PLAIN_WIDTH, no_color=True)
    layout = layout_of(binding)
    rows = plan_rows(plan, layout)
    for stack in dict.fromkeys(row.stack for row in rows):
        measure = "predicted KL" if plan.search else "damage"
        console.print(_table(stack, [row for row in rows if row.stack == stack], measure, colours))
    for path, bits, damage in outside_rows(plan, layout):
        predicted = "" if damage is None else f", predicted KL {damage:.2g}"
        console.print(Text(f"{path}: {bits} bits{predicted}"))


def plain_plan(plan: Plan, binding: Binding) -> str:
    """The same as text."""
    buffer = StringIO()
    print_plan(plan, binding, file=buffer)
    return buffer.getvalue()


def _table(stack: str, rows: Sequence[PlanRow], measure: str, colours: bool) -> Table:
    table = Table(title=stack, title_justify="left", box=box.SIMPLE_HEAVY if colours else box.ASCII2, pad_edge=False)
    table.add_column("block", justify="right")
    columns: list[Callable[[PlanRow], Text]] = []
    for part, name in PARTS.items():
        if any(part in row.bits for row in rows):
            table.add_column(f"{name} bits", justify="center")
            columns.append(partial(_bits, part=part, colours=colours))
    for unit, (name, _) in UNITS.items():
        if any(unit in row.units for row in rows):
            table.add_column(name, justify="right")
            columns.append(partial(_share, unit=unit))
    largest = max((row.damage for row in rows if row.damage is not None), default=0.0)
    if largest > 0:
        table.add_column(measure)
        columns.append(partial(_damage, largest=largest, colours=colours))
    for row in rows:
        table.add_row(str(row.block), *(column(row) for column in columns))
    return table


def _bits(row: PlanRow, part: str, colours: bool) -> Text:
    if "block" in row.removed:
        return Text("dropped", "dim" if colours else "")
    if part in row.removed:
        return Text("out", "dim" if colours else "")
    said = row.said_bits(part)
    lowest = min((bits for bits in row.bits.get(part, ()) if bits is not None), default=None)
    if not colours or lowest is None:
        return Text(said)
    colour = KEPT["light"][level_of_bits(lowest)]
    return Text(f" {said} ", Style(color=ink_on(colour), bgcolor=colour))


def _share(row: PlanRow, unit: str) -> Text:
    return Text("-" if unit not in row.units or row.without(UNITS[unit][1]) else str(row.units[unit]))


def _damage(row: PlanRow, largest: float, colours: bool) -> Text:
    """The figure with a bar, as long and as red as the damage is large."""
    if row.damage is None:
        return Text("")
    part = max(0.0, row.damage / largest)
    bar = ("█" if colours else "#") * max(1, round(BAR * part))
    text = Text(f"{row.damage:<8.2g} ")
    red, green = round(80 + 160 * part), round(170 - 120 * part)
    text.append(bar, Style(color=f"#{red:02x}{green:02x}40") if colours else None)
    return text
