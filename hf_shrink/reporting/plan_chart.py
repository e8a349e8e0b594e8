"""A plan as a heat map: a column a block; rows for bits, for what is kept of units, and for the predicted damage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from hf_shrink.architectures.binding import Binding
from hf_shrink.errors import RecipeError
from hf_shrink.plan import Plan
from hf_shrink.reporting.plan_rows import PlanRow, Share, plan_rows
from hf_shrink.reporting.plan_table import COLOURS, PARTS
from hf_shrink.reporting.plots import can_plot, figure_of, save
from hf_shrink.reporting.style import STYLE

CELL_WIDTH, CELL_HEIGHT, LABEL = 34, 26, 150
GONE = "#2b2f36"
DENSE = "#8c959f"


@dataclass(frozen=True)
class Cell:
    """Text, colour, and what is said when one points at it."""

    text: str
    colour: str
    tip: str


def write_plan_map(plan: Plan, binding: Binding, path: str | Path) -> Path:
    """Draw the plan to a .png (with matplotlib) or a .html file; returns its path.

    Raises:
        RecipeError: another kind of file, or matplotlib is not installed.
    """
    path = Path(path)
    rows = plan_rows(plan, binding)
    stacks = {name: [row for row in rows if row.stack == name] for name in dict.fromkeys(row.stack for row in rows)}
    if path.suffix == ".html":
        maps = "".join(f"<h2>{escape(name)}</h2>{plan_map(found)}" for name, found in stacks.items())
        path.write_text(
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Compression plan</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
            f"<main><h1>Compression plan</h1>{maps}<h2>In words</h2><pre>{escape(plan.summary())}</pre></main></body>"
            "</html>\n"
        )
    elif path.suffix == ".png":
        if not can_plot():
            raise RecipeError("a .png needs matplotlib (pip install 'hf_shrink[report]'); or name a .html file")
        save(_drawn(stacks), path)
    else:
        raise RecipeError(f"{path.name}: figures are .png or .html files")
    return path


def plan_map(rows: Sequence[PlanRow]) -> str:
    """The map of one stack as inline SVG; numbers stand in the cells, colour only helps."""
    table = cells(rows)
    shapes = []
    for line, (name, found) in enumerate(table.items()):
        y = line * CELL_HEIGHT
        shapes.append(f'<text class="label" x="{LABEL - 8}" y="{y + 17}" text-anchor="end">{escape(name)}</text>')
        for column, cell in enumerate(found):
            x: float = LABEL + column * CELL_WIDTH
            shapes.append(
                f'<rect x="{x}" y="{y}" width="{CELL_WIDTH - 2}" height="{CELL_HEIGHT - 2}" rx="3" '
                f'fill="{cell.colour}"><title>{escape(cell.tip)}</title></rect>'
            )
            middle = x + (CELL_WIDTH - 2) / 2
            shapes.append(
                f'<text class="cell" x="{middle}" y="{y + 16}" text-anchor="middle" style="font-size:11px">'
                f"{escape(cell.text)}</text>"
            )
    bottom = CELL_HEIGHT * len(table) + 14
    for column, row in enumerate(rows):
        x = LABEL + column * CELL_WIDTH + CELL_WIDTH / 2
        shapes.append(f'<text class="label" x="{x}" y="{bottom}" text-anchor="middle">{row.block}</text>')
    wide, high = LABEL + CELL_WIDTH * len(rows), bottom + 8
    text = escape(f"What the plan does to {len(rows)} blocks: {', '.join(table)}.")
    return (
        f'<div class="scroll" tabindex="0"><svg viewBox="0 0 {wide} {high}" role="img" aria-label="{text}" '
        f'style="min-width:{min(wide, 1200)}px" preserveAspectRatio="xMinYMin"><title>{text}</title>'
        f"{''.join(shapes)}</svg></div>"
    )


def cells(rows: Sequence[PlanRow]) -> dict[str, list[Cell]]:
    """By name of the line, a cell a block."""
    table: dict[str, list[Cell]] = {}
    for part, name in PARTS.items():
        if any(part in row.bits for row in rows):
            table[f"{name} bits"] = [_bits(row, part) for row in rows]
    for field, part, name in (
        ("groups", "attention", "KV groups"),
        ("heads", "attention", "query heads"),
        ("channels", "mlp", "channels"),
        ("experts", "experts", "experts"),
    ):
        if any(getattr(row, field) is not None for row in rows):
            table[name] = [_share(row, getattr(row, field), part, name) for row in rows]
    largest = max((row.damage for row in rows if row.damage is not None), default=0.0)
    if largest > 0:
        table["predicted KL"] = [_damage(row, largest) for row in rows]
    return table


def _bits(row: PlanRow, part: str) -> Cell:
    if "block" in row.removed or part in row.removed:
        return Cell("x", GONE, f"block {row.block}: {'dropped' if 'block' in row.removed else part + ' out'}")
    known = [bits for bits in row.bits.get(part, ()) if bits is not None]
    said = row.said_bits(part)
    colour = COLOURS[min(known)] if known else DENSE
    return Cell("" if said in ("dense", "-") else said, colour, f"block {row.block}: {said} bits")


def _share(row: PlanRow, share: Share | None, part: str, name: str) -> Cell:
    if share is None or "block" in row.removed or part in row.removed:
        return Cell("x", GONE, f"block {row.block}: no {name}")
    kept = share.kept / share.total
    return Cell(str(share.kept), _between((168, 72, 12), (31, 111, 67), kept), f"block {row.block}: {share} {name}")


def _damage(row: PlanRow, largest: float) -> Cell:
    if row.damage is None:
        return Cell("", DENSE, f"block {row.block}: nothing predicted")
    part = max(0.0, row.damage / largest)
    return Cell(
        f"{row.damage:.0e}".replace("e-0", "e-"),
        _between((31, 111, 67), (143, 29, 20), part),
        f"block {row.block}: KL {row.damage:.3g}",
    )


def _between(low: tuple[int, int, int], high: tuple[int, int, int], part: float) -> str:
    mixed = (round(a + (b - a) * part) for a, b in zip(low, high, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


def _drawn(stacks: dict[str, list[PlanRow]]) -> Any:
    most = max(len(rows) for rows in stacks.values())
    tables = {name: cells(rows) for name, rows in stacks.items()}
    height = sum(0.32 * len(table) + 0.7 for table in tables.values())
    figure, _ = figure_of(1.8 + 0.42 * most, height, columns=0)
    axes = figure.subplots(len(tables), 1, squeeze=False)[:, 0]
    for one, (name, table) in zip(axes, tables.items(), strict=True):
        for line, found in enumerate(table.values()):
            for column, cell in enumerate(found):
                one.add_patch(_rectangle(column, line, cell.colour))
                one.text(column, line, cell.text, ha="center", va="center", color="white", fontsize=6.5)
        one.set_xlim(-0.5, len(stacks[name]) - 0.5)
        one.set_ylim(len(table) - 0.5, -0.5)
        one.set_xticks(range(len(stacks[name])), [str(row.block) for row in stacks[name]], fontsize=7)
        one.set_yticks(range(len(table)), list(table), fontsize=8)
        one.set_xlabel(f"block of {name}", fontsize=8)
        one.spines[:].set_visible(False)
        one.tick_params(length=0)
    return figure


def _rectangle(column: int, line: int, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.46, line - 0.44), 0.92, 0.88, facecolor=colour)
