"""The first thing that one sees of a report: size, speed and quality as large figures, dense beside compressed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from hf_shrink.report import ShrinkReport
from hf_shrink.reporting.figures import figure, in_order, metric_row, number, size, speed_name, speedup

MOST_METRICS = 2


@dataclass(frozen=True)
class Tile:
    """One figure.

    Attributes:
        unit: of the figure; empty where it has none.
        aside: the dense model's figure, or the interval, in words; empty where there is neither.
        change: what became of it, in words.
        bars: the dense model's figure and the compressed one's as lengths from 0 to 1, where lengths say something.
    """

    name: str
    figure: str
    aside: str
    change: str
    unit: str = ""
    bars: tuple[float, float] | None = None


def tiles(report: ShrinkReport) -> list[Tile]:
    """What was measured, the most important first."""
    found = []
    if report.bytes_before and report.bytes_after:
        before, after = report.bytes_before, report.bytes_after
        change = f"{report.compression:.2f}x smaller"
        amount, unit = size(after).split(" ")
        found.append(Tile("Size", amount, f"dense {size(before)}", change, unit, _lengths(before, after)))
    speed = report.evaluation.get("speed")
    if speed:
        dense, compressed = number(speed["dense"]), number(speed["compressed"])
        change = f"{speedup(speed):.2f}x as fast"
        lengths = _lengths(dense, compressed)
        found.append(Tile(speed_name(speed), f"{compressed:.3g}", f"dense {dense:.3g}", change, speed["unit"], lengths))
    return found + _quality(report.evaluation)


def tiles_html(report: ShrinkReport) -> str:
    """As a list of names and figures."""
    return f'<dl class="tiles">{"".join(map(_tile, tiles(report)))}</dl>' if tiles(report) else ""


def _quality(evaluation: Mapping[str, Any]) -> list[Tile]:
    dense, compressed = evaluation.get("dense", {}), evaluation.get("compressed", {})
    found: list[Tile] = []
    for key in in_order(compressed)[:MOST_METRICS]:
        change, aside = "", f"dense {figure(number(dense[key]), key)}" if key in dense else ""
        if key == "perplexity" and evaluation.get("excess_loss") is not None:
            change = f"excess loss {number(evaluation['excess_loss']):.3g} nats"
        elif key not in dense and isinstance(compressed[key], Mapping) and compressed[key].get("low") is not None:
            low, high = (figure(compressed[key][bound], key) for bound in ("low", "high"))
            aside = f"95%: {low} to {high}"
        found.append(Tile(metric_row(key)[0], figure(number(compressed[key]), key), aside, change))
    return found


def _tile(tile: Tile) -> str:
    aside = f'<span class="dense">{escape(tile.aside)}</span>' if tile.aside else ""
    change = f'<span class="change">{escape(tile.change)}</span>' if tile.change else ""
    bars = ""
    if tile.bars is not None:
        kinds = zip(("bar was", "bar"), tile.bars, strict=True)
        bars = "".join(
            f'<span class="{kind}" aria-hidden="true"><i style="width:{100 * length:.1f}%"></i></span>'
            for kind, length in kinds
        )
    name, value = escape(tile.name), escape(tile.figure)
    value += f' <span class="unit">{escape(tile.unit)}</span>' if tile.unit else ""
    return f'<div><dt>{name}</dt><dd class="figure">{value}</dd><dd>{aside}{change}{bars}</dd></div>'


def _lengths(dense: float, compressed: float) -> tuple[float, float]:
    largest = max(dense, compressed)
    return dense / largest, compressed / largest
