"""A plan drawn to a file: a page, or a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_shrink.architectures.binding import Binding
from hf_shrink.plan import Plan
from hf_shrink.reporting.layout import layout_of
from hf_shrink.reporting.page import page, paragraph
from hf_shrink.reporting.palette import BASE, DAMAGE, KEPT, ink_on
from hf_shrink.reporting.plan_map import GONE, Cell, cells, plan_map
from hf_shrink.reporting.plan_rows import PlanRow, plan_rows
from hf_shrink.reporting.plots import check_figure, figure_of, save

WIDTH, HEIGHT = 0.26, 0.26  # of a cell, inches


def write_plan_map(plan: Plan, binding: Binding, path: str | Path) -> Path:
    """Draw the plan to a .png (with matplotlib) or a .html file; returns its path.

    Raises:
        RecipeError: another kind of file, or matplotlib is not installed.
    """
    path = Path(path)
    check_figure(path)
    stacks = by_stack(plan_rows(plan, layout_of(binding)))
    if path.suffix == ".html":
        sections = [(f"Blocks of {name}", name, plan_map(rows)) for name, rows in stacks.items()]
        words = ("In words", "In words", "".join(map(paragraph, plan.summary().splitlines())))
        path.write_text(page("Compression plan", plan.model_type, "", [*sections, words]), encoding="utf-8")
    else:
        save(draw_plan(stacks), path)
    return path


def by_stack(rows: Sequence[PlanRow]) -> dict[str, list[PlanRow]]:
    """The rows of each stack, in order."""
    return {name: [row for row in rows if row.stack == name] for name in dict.fromkeys(row.stack for row in rows)}


def draw_plan(stacks: dict[str, list[PlanRow]]) -> Any:
    """The maps of all stacks, one below the other, as a figure of matplotlib."""
    most = max(len(rows) for rows in stacks.values())
    tables = {name: cells(rows) for name, rows in stacks.items()}
    height = sum(HEIGHT * len(table) + 0.6 for table in tables.values())
    figure, _ = figure_of(1.5 + WIDTH * most, height, columns=0)
    ratios = [len(table) for table in tables.values()]
    axes = figure.subplots(len(tables), 1, squeeze=False, gridspec_kw={"height_ratios": ratios})[:, 0]
    for one, (name, table) in zip(axes, tables.items(), strict=True):
        for line, found in enumerate(table.values()):
            for column, cell in enumerate(found):
                _draw_cell(one, column, line, cell)
        one.set_xlim(-0.5, most - 0.5)
        one.set_ylim(len(table) - 0.5, -0.5)
        one.set_xticks(range(len(stacks[name])), [str(row.block) for row in stacks[name]], fontsize=6.5)
        one.set_yticks(range(len(table)), list(table), fontsize=8)
        one.set_xlabel(f"block of {name}", fontsize=8)
        one.spines[:].set_visible(False)
        one.tick_params(length=0)
    return figure


def _draw_cell(axes: Any, column: int, line: int, cell: Cell) -> None:
    from matplotlib.patches import Rectangle

    colour = _colour(cell.kind)
    corner, size = (column - 0.46, line - 0.46), (0.92, 0.92)
    hatch, edge = ("////", BASE["light"]["line"]) if cell.kind == GONE else (None, "none")
    axes.add_patch(Rectangle(corner, *size, facecolor=colour, edgecolor=edge, hatch=hatch, linewidth=0))
    axes.text(column, line, cell.text, ha="center", va="center", color=ink_on(colour), fontsize=6)


def _colour(kind: str) -> str:
    """What a class of the style sheet looks like in the light."""
    if kind[1:].isdigit():
        return KEPT["light"][int(kind[1:])] if kind[0] == "k" else DAMAGE["light"][int(kind[1:])]
    return BASE["light"]["back"]
