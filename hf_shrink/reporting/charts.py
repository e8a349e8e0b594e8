"""Charts of the HTML report as inline SVG, coloured by the page's own style sheet so that dark mode works."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from hf_shrink.report import ShrinkReport
from hf_shrink.reporting.figures import BitGrid, size

CELL = 26
LABEL = 190


def size_bars(report: ShrinkReport) -> str:
    """Stored bytes, dense above compressed."""
    before, after = report.bytes_before, report.bytes_after
    largest = max(before, after, 1)
    parts = []
    for line, (name, amount) in enumerate((("Dense", before), ("Compressed", after))):
        width, y = 380 * amount / largest, 8 + 40 * line
        parts.append(f'<text class="label" x="92" y="{y + 19}" text-anchor="end">{name}</text>')
        parts.append(f'<rect class="bar{line}" x="100" y="{y}" width="{width:.1f}" height="28" rx="3"/>')
        parts.append(f'<text class="label" x="{108 + width:.1f}" y="{y + 19}">{size(amount)}</text>')
    text = f"Size of the weights: dense {size(before)}, compressed {size(after)}."
    return _svg(580, 88, text, parts)


def block_error_bars(errors: Mapping[str, float]) -> str:
    """Relative squared output error by block, on a linear axis from 0."""
    largest = max(errors.values()) or 1.0
    width = max(320, 70 + 22 * len(errors))
    step = (width - 70) / len(errors)
    parts = [
        f'<line class="axis" x1="60" x2="{width - 4}" y1="150" y2="150"/>',
        f'<text class="label" x="54" y="18" text-anchor="end">{largest:.2g}</text>',
        '<text class="label" x="54" y="154" text-anchor="end">0</text>',
    ]
    for i, (path, error) in enumerate(errors.items()):
        height, x = 136 * error / largest, 62 + i * step
        tip = f"<title>{escape(path)}: {error:.3g}</title>"
        parts.append(
            f'<rect class="bar1" x="{x:.1f}" y="{150 - height:.1f}" width="{step * 0.8:.1f}" height="{height:.1f}">'
            f"{tip}</rect>"
        )
        if i % max(1, len(errors) // 15) == 0:
            number = path.rsplit(".", 1)[-1]
            middle = x + step * 0.4
            parts.append(f'<text class="label" x="{middle:.1f}" y="168" text-anchor="middle">{escape(number)}</text>')
    worst = max(errors, key=lambda path: errors[path])
    text = f"Relative squared output error of {len(errors)} blocks; the largest is {largest:.3g} at {worst}."
    return _svg(width, 178, text, parts, wide=True)


def bit_map(grid: BitGrid) -> str:
    """Bits of each weight: a row per role, a column per block; the number stands in the cell, colour only helps."""
    width, height = LABEL + CELL * len(grid.blocks) + 4, CELL * (len(grid.roles) + 1)
    parts = []
    for i, (role, line) in enumerate(zip(grid.roles, grid.bits, strict=True)):
        y = i * CELL
        parts.append(f'<text class="label" x="{LABEL - 8}" y="{y + 18}" text-anchor="end">{escape(role)}</text>')
        for j, bits in enumerate(line):
            x = LABEL + j * CELL
            kind = "none" if bits is None else f"b{bits}"
            parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{CELL - 2}" height="{CELL - 2}" rx="3"/>')
            shown = "-" if bits is None else str(bits)
            parts.append(f'<text class="cell" x="{x + 12}" y="{y + 17}" text-anchor="middle">{shown}</text>')
    bottom = CELL * len(grid.roles) + 16
    for j, block in enumerate(grid.blocks):
        x = LABEL + j * CELL + 12
        parts.append(f'<text class="label" x="{x}" y="{bottom}" text-anchor="middle">{block}</text>')
    used = sorted({bits for line in grid.bits for bits in line if bits is not None})
    text = f"Bits of the weights in {grid.stack}: {len(grid.roles)} roles in {len(grid.blocks)} blocks, bits used: "
    return _svg(width, height, text + ", ".join(map(str, used)) + ".", parts, wide=True)


def _svg(width: float, height: float, text: str, parts: list[str], wide: bool = False) -> str:
    """The picture with its text alternative; a wide one keeps its size and scrolls on a phone."""
    style = f' style="min-width:{min(width, 900):.0f}px"' if wide else ""
    picture = (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(text)}"{style} '
        f'preserveAspectRatio="xMinYMin"><title>{escape(text)}</title>{"".join(parts)}</svg>'
    )
    return f'<div class="scroll" tabindex="0">{picture}</div>' if wide else picture
