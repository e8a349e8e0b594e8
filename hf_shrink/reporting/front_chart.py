"""The front of a sweep: size or latency against KL divergence and perplexity, and which lever paid where."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hf_shrink.errors import RecipeError
from hf_shrink.front import Front, Point
from hf_shrink.reporting.figures import size
from hf_shrink.reporting.plots import can_plot, figure_of, save
from hf_shrink.reporting.style import STYLE

AXES = {"bytes": "stored weights in MB", "memory": "weights and KV cache in MB", "decode": "ms a token, decoding"}
AXES["prefill"] = "ms a token of a prompt"
LEVERS = {"bits": "#0b5cad", "width": "#a8480c", "depth": "#6b2fa0"}
KINDS = {"dense": ("dense", "#8c959f", "s"), "uniform": ("same bits everywhere", "#8f1d14", "^")}
KINDS["plan"] = ("plans", "#0b6bcb", "o")


def front_lines(front: Front) -> list[str]:
    """The points as a plain table, smallest first."""
    heads = ("", "MB", "of dense", "KL", "perplexity", "predicted KL", "paid by bits / width / depth")
    dense = next(point for point in front.points if point.kind == "dense")
    lines = [heads]
    for point in sorted(front.points, key=lambda p: (front.takes(p), p.name)):
        saved = sum(point.paid.values())
        paid = " / ".join(f"{point.paid.get(lever, 0.0) / saved:.0%}" for lever in LEVERS) if saved else ""
        lines.append(
            (
                point.name,
                f"{point.bytes / 1e6:.1f}",
                f"{front.takes(point) / front.takes(dense):.1%}",
                f"{point.kl:.4f}",
                "" if point.perplexity is None else f"{point.perplexity:.2f}",
                f"{point.predicted:.4f}" if point.kind != "dense" else "",
                paid,
            )
        )
    widths = [max(len(line[place]) for line in lines) for place in range(len(heads))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]


def write_front(front: Front, path: str | Path) -> Path:
    """Draw the front to a .png (with matplotlib) or a .html file; returns its path.

    Raises:
        RecipeError: another kind of file, or matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix == ".html":
        path.write_text(front_html(front))
    elif path.suffix == ".png":
        if not can_plot():
            raise RecipeError("a .png needs matplotlib (pip install 'hf_shrink[report]'); or name a .html file")
        save(_drawn(front), path)
    else:
        raise RecipeError(f"{path.name}: figures are .png or .html files")
    return path


def _drawn(front: Front) -> Any:
    perplexities = all(point.perplexity is not None for point in front.points)
    figure, axes = figure_of(11 if perplexities else 8, 3.8, columns=3 if perplexities else 2)
    values: list[tuple[str, Callable[[Point], float]]] = [("KL divergence in nats", lambda p: p.kl)]
    if perplexities:
        values.append(("perplexity", lambda p: p.perplexity or 0.0))
    for panel, (name, value) in zip(axes, values, strict=False):
        for kind, (label, colour, marker) in KINDS.items():
            points = sorted((p for p in front.points if p.kind == kind), key=front.takes)
            x, y = [_shown(front, p) for p in points], [value(p) for p in points]
            line = "-" if kind == "plan" else ""
            panel.plot(x, y, linestyle=line, marker=marker, color=colour, label=label)
            for point, left, top in zip(points, x, y, strict=True):
                panel.annotate(point.name, (left, top), xytext=(4, 4), textcoords="offset points", fontsize=8)
        panel.set_xlabel(AXES[front.resource])
        panel.set_ylabel(name)
    axes[0].set_yscale("symlog", linthresh=_threshold(front))
    axes[0].legend(frameon=False)
    bars, bottom = _plans(front), [0.0] * len(_plans(front))
    for lever, colour in LEVERS.items():
        heights = [point.paid.get(lever, 0.0) / 1e6 for point in bars]
        axes[-1].bar([point.name for point in bars], heights, bottom=bottom, color=colour, label=lever)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes[-1].set_ylabel("MB saved by")
    axes[-1].legend(frameon=False)
    return figure


def front_html(front: Front) -> str:
    """One page that needs nothing else: the front, the table, and a map of where each lever paid."""
    maps = "".join(f"<h3>{escape(point.name)}</h3>{_where(point)}" for point in _plans(front))
    legend = ", ".join(f'<span style="color:{colour}">{lever}</span>' for lever, colour in LEVERS.items())
    title = f"{escape(front.source)}: what each budget buys"
    body = (
        f"<h1>{title}</h1><p>{escape(front.data)}</p><section><h2>KL divergence</h2>{_scatter(front)}</section>"
        f"<section><h2>Figures</h2><pre>{escape(chr(10).join(front_lines(front)))}</pre></section>"
        f"<section><h2>Which lever paid where</h2><p>Bytes saved by part of the model: {legend}.</p>{maps}</section>"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>'
        f'{title}</title><meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style>'
        f"</head><body><main>{body}</main></body></html>\n"
    )


def _scatter(front: Front) -> str:
    """KL on a root axis, which shows small and large divergences both."""
    wide, high, left, base = 640, 320, 60, 280
    right = max(front.takes(p) for p in front.points) or 1.0
    top = math.sqrt(max(p.kl for p in front.points)) or 1.0
    parts = [
        f'<line class="axis" x1="{left}" x2="{wide - 4}" y1="{base}" y2="{base}"/>',
        f'<text class="label" x="{left - 6}" y="18" text-anchor="end">{top**2:.2g}</text>',
        f'<text class="label" x="{left - 6}" y="{base + 4}" text-anchor="end">0</text>',
        f'<text class="label" x="{wide - 4}" y="{high - 8}" text-anchor="end">{AXES[front.resource]}</text>',
    ]
    line = []
    for point in sorted(front.points, key=front.takes):
        x = left + (wide - left - 60) * front.takes(point) / right
        y = base - (base - 24) * math.sqrt(point.kl) / top
        _, colour, _ = KINDS[point.kind]
        tip = escape(f"{point.name}: {_shown(front, point):.4g}, KL {point.kl:.4g}")
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"><title>{tip}</title></circle>')
        parts.append(f'<text class="label" x="{x + 8:.1f}" y="{y - 6:.1f}">{escape(point.name)}</text>')
        if point.kind == "plan":
            line.append(f"{x:.1f},{y:.1f}")
    colour = KINDS["plan"][1]
    parts.append(f'<polyline points="{" ".join(line)}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    text = f"KL divergence against {AXES[front.resource]} of {len(front.points)} models."
    return f'<svg viewBox="0 0 {wide} {high}" role="img" aria-label="{escape(text)}">{"".join(parts)}</svg>'


def _where(point: Point) -> str:
    """A column for each part of the model, its bars as high as the bytes that levers saved there."""
    groups = list(point.by_group.items())
    step, high = 14, 90
    largest = max((sum(parts.values()) for _, parts in groups), default=1.0) or 1.0
    shapes = []
    for place, (name, parts) in enumerate(groups):
        bottom = float(high)
        for lever, colour in LEVERS.items():
            height = high * max(0.0, parts.get(lever, 0.0)) / largest
            bottom -= height
            tip = escape(f"{name}: {size(parts.get(lever, 0.0))} by {lever}")
            shapes.append(
                f'<rect x="{place * step}" y="{bottom:.1f}" width="{step - 2}" height="{height:.1f}" fill="{colour}">'
                f"<title>{tip}</title></rect>"
            )
    wide = max(step * len(groups), 1)
    text = escape(f"Bytes saved by part of the model at {point.name}.")
    return (
        f'<div class="scroll" tabindex="0"><svg viewBox="0 0 {wide} {high}" role="img" aria-label="{text}" '
        f'style="min-width:{min(wide, 900)}px" preserveAspectRatio="xMinYMin">{"".join(shapes)}</svg></div>'
    )


def _plans(front: Front) -> Sequence[Point]:
    return sorted((point for point in front.points if point.kind == "plan"), key=front.takes)


def _shown(front: Front, point: Point) -> float:
    """What a point takes, in the axis's unit."""
    return front.takes(point) * (1000 if front.resource in ("decode", "prefill") else 1e-6)


def _threshold(front: Front) -> float:
    """Where the KL axis turns from linear to logarithmic: below it only the dense model lies."""
    return max(min((p.kl for p in front.points if p.kl > 0), default=1e-3), 1e-6)
