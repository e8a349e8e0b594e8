"""The README's picture: three rows of bars from the same figures as its tables, as an SVG that follows dark mode."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from readme_tables import by_speed, name_of, rated

WIDTH, LINE, LABEL, BAR = 820, 26, 320, 400
STYLE = """text{font:14px system-ui,sans-serif;fill:#1f2328}.head{font-weight:600;font-size:15px}
.other{fill:#8c959f}.ours{fill:#0b6bcb}.soft{fill:#59636e}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.other{fill:#6e7681}.ours{fill:#4493f8}.soft{fill:#9da7b3}}"""


@dataclass(frozen=True)
class Bar:
    name: str
    value: float
    ours: bool
    digits: int


@dataclass(frozen=True)
class Panel:
    """Bars from the best to the worst, under a heading that says which direction is good."""

    heading: str
    bars: Sequence[Bar]


def panels(quality: Mapping[str, Any], older: Mapping[str, Any], speed: Mapping[str, Any], subject: str) -> list[Panel]:
    """What is shown: loss at 4 bits, decoding speed, and bytes of what is decoded."""
    rows = [row for row in rated(quality, older) if row.bits == 4 and row.losses[0] is not None]
    loss = [Bar(_plain(row.name), row.losses[0] or 0.0, row.ours, 3) for row in rows]
    decode, size = [], []
    for result in by_speed(speed, subject):
        found, name = speed["summary"][result["variant"]], _plain(name_of({**result, "kind": "peer"}))
        decode.append(Bar(name, found["decode"]["median"], result["kind"] == "ours", 1))
        if found.get("weights") and not result["compiled"] and result["kind"] in ("dense", "ours"):
            size.append(Bar(name, found["weights"] / 1e6, result["kind"] == "ours", 0))
    text = next(iter(quality["protocol"]["held_out"]))
    return [
        Panel(f"Loss over the dense model at 4 bits, nats a token on {text}: less is better", _sorted(loss)),
        Panel("Decoding on 2 CPU threads, tokens a second: more is better", decode),
        Panel("Weights, MB: less is better", _sorted(size)),
    ]


def picture(shown: Sequence[Panel], title: str) -> str:
    """The SVG, with its text alternative."""
    parts, y = [], 30
    for panel in shown:
        parts.append(f'<text class="head" x="10" y="{y}">{escape(panel.heading)}</text>')
        largest = max(bar.value for bar in panel.bars)
        for bar in panel.bars:
            y += LINE
            width = max(BAR * bar.value / largest, 1)
            kind = "ours" if bar.ours else "other"
            parts.append(f'<text x="{LABEL - 10}" y="{y}" text-anchor="end">{escape(bar.name)}</text>')
            parts.append(f'<rect class="{kind}" x="{LABEL}" y="{y - 14}" width="{width:.1f}" height="18" rx="3"/>')
            value = f"{bar.value:.{bar.digits}f}"
            parts.append(f'<text x="{LABEL + width + 8:.1f}" y="{y}">{value}</text>')
        y += 44
    height, said = y - 24, escape(". ".join([title, *map(_said, shown)]))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">\n'
        f"<title>{escape(title)}</title><desc>{said}</desc>\n<style>{STYLE}</style>\n{body}\n</svg>\n"
    )


def _said(panel: Panel) -> str:
    bars = "; ".join(f"{bar.name} {bar.value:.{bar.digits}f}" for bar in panel.bars)
    return f"{panel.heading}: {bars}"


def _sorted(bars: Sequence[Bar]) -> list[Bar]:
    return sorted(bars, key=lambda bar: bar.value)


def _plain(name: str) -> str:
    """Without Markdown and brackets."""
    return re.sub(r"\s*\(.*?\)", "", name.replace("*", "").replace("`", ""))
