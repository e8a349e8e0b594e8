"""A plan as a heat map: a column a block; lines for the bits of each role, what is kept, and the predicted damage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from hf_shrink.reporting.page import legend, scrolling
from hf_shrink.reporting.palette import DENSE_LEVEL, level_of_bits, level_of_damage, level_of_share
from hf_shrink.reporting.plan_rows import UNITS, PlanRow, said

OUT = "\N{MULTIPLICATION SIGN}"
WHOLE, GONE, NOTHING = f"k{DENSE_LEVEL}", "gone", "nothing"


@dataclass(frozen=True)
class Cell:
    """One figure.

    Attributes:
        kind: a class of the style sheet: a colour of the palette ("k4", "d2"), `GONE` or `NOTHING`.
        tip: what is said of it to who points at it.
        aside: what is read out where the text says nothing.
    """

    text: str
    kind: str
    tip: str
    aside: str = ""


def cells(rows: Sequence[PlanRow]) -> dict[str, list[Cell]]:
    """By name of the line, a cell a block. `rows`: of one stack."""
    table: dict[str, list[Cell]] = {}
    for role in dict.fromkeys(role for row in rows for role in row.roles):
        table[role] = [_bits(row, role) for row in rows]
    for unit, (name, _) in UNITS.items():
        if any(unit in row.units for row in rows):
            percent = any(row.units[unit].total > 999 for row in rows if unit in row.units)
            table[f"{name}, %" if percent else name] = [_share(row, unit, percent) for row in rows]
    largest = max((row.damage for row in rows if row.damage is not None), default=0.0)
    if largest > 0:
        power = math.floor(math.log10(largest)) - 1
        table[f"predicted KL, 1e{power}"] = [_damage(row, largest, power) for row in rows]
    return table


def plan_map(rows: Sequence[PlanRow]) -> str:
    """The map of one stack as an HTML table with its legend; figures stand in the cells, colour only helps."""
    table = cells(rows)
    stack = rows[0].stack
    heads = "".join(f'<th scope="col">{row.block}</th>' for row in rows)
    lines = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(map(_cell, found))}</tr>' for name, found in table.items()
    )
    text = f"What is kept of the {len(rows)} blocks of {stack}"
    html = (
        f'<table class="map"><caption class="hidden">{escape(text)}: a column for each block.</caption>'
        f'<thead><tr><th scope="col">block</th>{heads}</tr></thead><tbody>{lines}</tbody></table>'
    )
    return scrolling(html, text) + legend(_legend(rows, table))


def _cell(cell: Cell) -> str:
    aside = f'<span class="hidden">{escape(cell.aside)}</span>' if cell.aside else ""
    shown = f'<span aria-hidden="true">{escape(cell.text)}</span>' if aside else escape(cell.text)
    return f'<td class="{cell.kind}" title="{escape(cell.tip)}">{aside}{shown}</td>'


def _legend(rows: Sequence[PlanRow], table: dict[str, list[Cell]]) -> list[tuple[str, str]]:
    """Only of what is there."""
    parts = [(row.without(part), bits) for row in rows for part, bits in row.roles.values()]
    used = {found for gone, bits in parts if not gone for found in bits if found is not None}
    kinds = {cell.kind for found in table.values() for cell in found}
    entries = [(f"k{level_of_bits(bits)}", f"{bits} bits") for bits in sorted(used)]
    entries += [(WHOLE, "dense, whole")] if WHOLE in kinds else []
    entries += [(GONE, "taken out")] if GONE in kinds else []
    worst = max((kind for kind in kinds if kind[0] == "d"), default=None)
    return entries + ([(worst, "predicted to cost the most")] if worst is not None else [])


def _bits(row: PlanRow, role: str) -> Cell:
    if role not in row.roles:
        return Cell("", NOTHING, f"block {row.block}: no {role}", "none")
    part, bits = row.roles[role]
    if row.without(part):
        return Cell(
            OUT, GONE, f"block {row.block}: {'dropped' if 'block' in row.removed else f'without {part}'}", "out"
        )
    words = said(bits)
    if words == "dense":
        return Cell("", WHOLE, f"block {row.block}, {role}: dense", "dense")
    lowest = min(found for found in bits if found is not None)
    return Cell(words.replace("dense", "d"), f"k{level_of_bits(lowest)}", f"block {row.block}, {role}: {words} bits")


def _share(row: PlanRow, unit: str, percent: bool) -> Cell:
    name, part = UNITS[unit]
    if unit not in row.units:
        return Cell("", NOTHING, f"block {row.block}: no {name}", "none")
    if row.without(part):
        return Cell(OUT, GONE, f"block {row.block}: no {name} left", "out")
    share = row.units[unit]
    shown = f"{100 * share.part:.0f}" if percent else str(share.kept)
    return Cell(shown, f"k{level_of_share(share.part)}", f"block {row.block}: {share} {name}")


def _damage(row: PlanRow, largest: float, power: int) -> Cell:
    if row.damage is None:
        return Cell("", NOTHING, f"block {row.block}: nothing predicted", "none")
    shown = f"{row.damage / 10**power:.0f}"
    return Cell(shown, f"d{level_of_damage(row.damage / largest)}", f"block {row.block}: KL {row.damage:.3g}")
