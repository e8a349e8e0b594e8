"""Charts as inline SVG, coloured by the page's style sheet so that dark mode works.

Across, everything is in percent and text keeps its size, so that a chart fits a phone without scrolling or shrinking.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

HEIGHT = 190  # of a chart, px
TOP, BOTTOM = 18, 24  # above the highest and below the lowest value, px
LEFT, RIGHT = 9.0, 99.5  # percent: where values start, after the figures of the axis, and where they end
NAMES = 14.0  # percent at the right end that names of series take


@dataclass(frozen=True)
class Axis:
    """How values become heights, and where its lines are."""

    place: Callable[[float], float]  # value -> 0 (bottom) to 1 (top)
    ticks: tuple[float, ...]

    @classmethod
    def linear(cls, largest: float) -> Axis:
        """From 0 to a round figure."""
        largest = largest if largest > 0 else 1.0
        step = _round_up(largest / 3)
        count = max(1, math.ceil(largest / step - 1e-9))
        top = count * step
        return cls(lambda value: value / top, tuple(step * i for i in range(count + 1)))

    @classmethod
    def logarithmic(cls, least: float, largest: float) -> Axis:
        """Over whole powers of ten; both are positive."""
        low, high = math.floor(math.log10(least)), math.ceil(math.log10(largest))
        high = max(high, low + 1)
        step = max(1, math.ceil((high - low) / 4))
        ticks = tuple(10.0**power for power in range(low, high + 1, step))
        return cls(lambda value: (math.log10(value) - low) / (high - low), ticks)

    def y(self, value: float) -> float:
        """In px from the top."""
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - self.place(value))


def bar_chart(values: Mapping[str, float], text: str, kind: str = "main") -> str:
    """A bar for each value, on a linear axis from 0.

    Args:
        values: by path of a block; its number, the path's last part, stands below.
        text: the description.
        kind: class of the bars.
    """
    axis = Axis.linear(max(values.values()))
    step = (RIGHT - LEFT) / len(values)
    parts = _lines(axis)
    for place, (name, value) in enumerate(values.items()):
        y = axis.y(max(0.0, value))
        parts.append(
            f'<rect class="{kind}" x="{LEFT + step * (place + 0.12):.2f}%" y="{y:.1f}" '
            f'width="{0.76 * step:.2f}%" height="{HEIGHT - BOTTOM - y:.1f}">'
            f"{_tip(f'{name}: {value:.3g}')}</rect>"
        )
    return _svg(text, parts + _names([path.rsplit(".", 1)[-1] for path in values], step))


def dot_chart(columns: Sequence[str], series: Mapping[str, tuple[str, Sequence[float]]], text: str) -> str:
    """Dots above each column, on a logarithmic axis, each series named at its end; values that are not positive are
    left out.

    Args:
        series: by name, the class of its dots and a value a column.
    """
    positive = [value for _, values in series.values() for value in values if value > 0]
    axis = Axis.logarithmic(min(positive), max(positive))
    step = (RIGHT - NAMES - LEFT) / len(columns)
    parts = _lines(axis)
    lowest: float = 0
    for last, name in sorted((axis.y(v[-1]), name) for name, (_, v) in series.items() if v[-1] > 0):
        lowest = max(lowest + 13, last + 4)  # names do not lie on one another
        parts.append(_text(LEFT + step * len(columns) + 1, lowest, name.split()[0], "start", "name"))
    for name, (kind, values) in series.items():
        for place, (column, value) in enumerate(zip(columns, values, strict=True)):
            if value > 0:
                parts.append(
                    f'<circle class="{kind} dot" cx="{LEFT + step * (place + 0.5):.2f}%" cy="{axis.y(value):.1f}" '
                    f'r="4">{_tip(f"{column}, {name}: {value:.3g}")}</circle>'
                )
    return _svg(text, parts + _names(columns, step))


@dataclass(frozen=True)
class Dot:
    """A point of a scatter chart. Those of one `line` are joined in their order; `ring` marks one."""

    name: str
    x: float
    y: float
    kind: str
    line: str | None = None
    ring: bool = False


def scatter_chart(dots: Sequence[Dot], across: str, text: str) -> str:
    """Points on a linear axis across, from 0, and a logarithmic one upwards; what is 0 there lies at the bottom.

    Args:
        across: what the axis across counts.
    """
    positive = [dot.y for dot in dots if dot.y > 0] or [1.0]
    axis = Axis.logarithmic(min(positive), max(positive))
    wide = Axis.linear(max(dot.x for dot in dots))

    def x(value: float) -> float:
        return LEFT + (RIGHT - LEFT - 6) * wide.place(value)

    def y(value: float) -> float:
        return axis.y(value) if value > 0 else HEIGHT - BOTTOM

    parts = _lines(axis)
    for tick in wide.ticks:
        parts.append(_text(x(tick), HEIGHT - 6, f"{tick:g}", "middle"))
    parts.append(_text(RIGHT, HEIGHT + 10, across, "end"))
    for line in dict.fromkeys(dot.line for dot in dots if dot.line is not None):
        joined = [dot for dot in dots if dot.line == line]
        for one, other in pairwise(joined):
            parts.append(
                f'<line class="{one.kind}" x1="{x(one.x):.2f}%" y1="{y(one.y):.1f}" x2="{x(other.x):.2f}%" '
                f'y2="{y(other.y):.1f}" stroke-width="1.5"/>'
            )
    for dot in dots:
        place = f'cx="{x(dot.x):.2f}%" cy="{y(dot.y):.1f}"'
        parts.append(
            f'<circle class="{dot.kind}" {place} r="5">{_tip(f"{dot.name}: {dot.x:.4g}, {dot.y:.3g}")}</circle>'
        )
        parts += [f'<circle class="ring" {place} r="9"/>'] if dot.ring else []
        parts.append(_text(x(dot.x), y(dot.y) - 10, dot.name, "middle", "name"))
    return _svg(text, parts, HEIGHT + 14)


def _lines(axis: Axis) -> list[str]:
    """Lines across with the figures above them, the lowest one darker."""
    parts = []
    for tick in axis.ticks:
        y = axis.y(tick)
        kind = "base" if tick == axis.ticks[0] else "grid"
        parts.append(f'<line class="{kind}" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(0, y - 4, f"{tick:g}".replace("e-0", "e-"), "start"))
    return parts


def _names(names: Sequence[str], step: float) -> list[str]:
    """Of the columns, below; of many only some. `step`: percent between them."""
    every = max(1, math.ceil(len(names) / 10))
    return [
        _text(LEFT + step * (place + 0.5), HEIGHT - 8, name, "middle")
        for place, name in enumerate(names)
        if place % every == 0
    ]


def _text(x: float, y: float, words: str, anchor: str, kind: str = "") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<text{name} x="{x:.2f}%" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _tip(words: str) -> str:
    return f"<title>{escape(words)}</title>"


def _svg(text: str, parts: Sequence[str], height: int = HEIGHT) -> str:
    return f'<svg role="img" aria-label="{escape(text)}" height="{height}">{"".join(parts)}</svg>'


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 5 or 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * digit for digit in (1, 2, 2.5, 5, 10) if power * digit >= value * (1 - 1e-9))
