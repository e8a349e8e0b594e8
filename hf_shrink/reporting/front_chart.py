"""The front of a sweep: size or latency against KL divergence and perplexity, and which lever paid where."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hf_shrink.front import Front, Point
from hf_shrink.reporting.charts import Dot, scatter_chart
from hf_shrink.reporting.figures import size
from hf_shrink.reporting.page import figure, legend, page, paragraph, scrolling, table
from hf_shrink.reporting.palette import BASE
from hf_shrink.reporting.plots import check_figure, figure_of, save

AXES = {"bytes": "stored weights in MB", "memory": "weights and KV cache in MB", "decode": "ms a token, decoding"}
AXES["prefill"] = "ms a token of a prompt"
LEVERS = {"bits": "main", "width": "other", "depth": "muted"}
# By kind of point: its name, the class of its colour on a page, its marker in a picture.
KINDS = {"dense": ("dense", "muted", "s"), "uniform": ("same bits everywhere", "other", "^")}
KINDS["plan"] = ("plans of the search", "main", "o")
_COLOURS = {"main": BASE["light"]["accent"], "other": BASE["light"]["other"], "muted": BASE["light"]["dense"]}
HEADS = ("", "MB", "of dense", "KL", "perplexity", "predicted KL", "paid by bits / width / depth")


def front_rows(front: Front) -> list[tuple[str, ...]]:
    """The points as rows under `HEADS`, smallest first."""
    dense = next(point for point in front.points if point.kind == "dense")
    lines: list[tuple[str, ...]] = []
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
    return lines


def front_lines(front: Front) -> list[str]:
    """The points as a plain table, smallest first."""
    lines = [HEADS, *front_rows(front)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(HEADS))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]


def write_front(front: Front, path: str | Path) -> Path:
    """Draw the front to a .png (with matplotlib) or a .html file; returns its path.

    Raises:
        RecipeError: another kind of file, or matplotlib is not installed.
    """
    path = Path(path)
    check_figure(path)
    if path.suffix == ".html":
        path.write_text(front_html(front), encoding="utf-8")
    else:
        save(draw_front(front), path)
    return path


def front_figure(said: Mapping[str, Any]) -> str:
    """The front that a plan was taken from, as a figure of a page. `said`: what `Front.plan` put into the plan."""
    front, chosen = Front.from_dict(said), str(said["chosen"])
    return _figure(front, chosen) + paragraph(f"This model's plan is that of {chosen}, the point in the ring.", "note")


def front_html(front: Front) -> str:
    """One page that needs nothing else: the front, the table, and a map of where each lever paid."""
    maps = "".join(f"<h3>{escape(point.name)}</h3>{_where(point)}" for point in _plans(front))
    levers = legend((kind, lever) for lever, kind in LEVERS.items()) + maps
    sections = [
        ("KL divergence", "Divergence", _figure(front)),
        ("Bytes saved, by part of the model", "Levers", levers if maps else ""),
    ]
    lede = f'<p class="lede">{escape(front.data)}</p>'
    return page("Sweep over budgets", f"{front.source}: what each budget buys", lede, sections)


def _figure(front: Front, chosen: str | None = None) -> str:
    dots = [
        Dot(
            point.name,
            _shown(front, point),
            point.kl,
            KINDS[point.kind][1],
            "plans" if point.kind == "plan" else None,
            point.name == chosen,
        )
        for point in sorted(front.points, key=front.takes)
    ]
    text = f"KL divergence to the dense model against {AXES[front.resource]}, of {len(dots)} models."
    caption = (
        f"KL divergence to the dense model in nats, on a logarithmic axis, against {AXES[front.resource]}; weights "
        f"were compressed one by one. Measured on {front.data}."
    )
    kinds = dict.fromkeys(point.kind for point in front.points)
    picture = scatter_chart(dots, AXES[front.resource], text) + legend(
        (KINDS[kind][1], KINDS[kind][0]) for kind in kinds
    )
    return figure(caption, picture, table("Points of the sweep", HEADS, front_rows(front)))


def _where(point: Point) -> str:
    """A column for each part of the model, its bars as high as the bytes that levers saved there."""
    groups = list(point.by_group.items())
    step, high = 14, 90
    largest = max((sum(parts.values()) for _, parts in groups), default=1.0) or 1.0
    shapes = []
    for place, (name, parts) in enumerate(groups):
        bottom = float(high)
        for lever, kind in LEVERS.items():
            height = high * max(0.0, parts.get(lever, 0.0)) / largest
            bottom -= height
            tip = escape(f"{name}: {size(parts.get(lever, 0.0))} by {lever}")
            shapes.append(
                f'<rect class="{kind}" x="{place * step}" y="{bottom:.1f}" width="{step - 2}" height="{height:.1f}">'
                f"<title>{tip}</title></rect>"
            )
    wide = max(step * len(groups), 1)
    text = f"Bytes saved by part of the model at {point.name}."
    picture = (
        f'<svg role="img" aria-label="{escape(text)}" style="width:{wide}px;height:{high}px">{"".join(shapes)}</svg>'
    )
    return scrolling(picture, text)


def draw_front(front: Front) -> Any:
    """KL divergence, perplexity where all points have one, and what each lever saved, as a figure of matplotlib."""
    perplexities = all(point.perplexity is not None for point in front.points)
    saved = any(point.paid for point in front.points)
    figure, axes = figure_of(3.7 * (1 + perplexities + saved), 3.6, columns=1 + perplexities + saved)
    values: list[tuple[str, Callable[[Point], float]]] = [("KL divergence in nats", lambda p: p.kl)]
    if perplexities:
        values.append(("perplexity", lambda p: p.perplexity or 0.0))
    for panel, (name, value) in zip(axes, values, strict=False):
        for kind, (label, colour, marker) in KINDS.items():
            points = sorted((p for p in front.points if p.kind == kind), key=front.takes)
            x, y = [_shown(front, p) for p in points], [value(p) for p in points]
            line = "-" if kind == "plan" else ""
            panel.plot(x, y, linestyle=line, marker=marker, color=_COLOURS[colour], label=label)
            for point, left, top in zip(points, x, y, strict=True):
                panel.annotate(point.name, (left, top), xytext=(4, 4), textcoords="offset points", fontsize=8)
        panel.set_xlabel(AXES[front.resource])
        panel.set_ylabel(name)
    axes[0].set_yscale("symlog", linthresh=_threshold(front))
    axes[0].legend(frameon=False, ncols=1, loc="lower left", bbox_to_anchor=(0, 1), fontsize=8)
    if saved:
        _draw_levers(axes[-1], _plans(front))
    return figure


def _draw_levers(axes: Any, bars: Sequence[Point]) -> None:
    bottom = [0.0] * len(bars)
    for lever, kind in LEVERS.items():
        heights = [point.paid.get(lever, 0.0) / 1e6 for point in bars]
        axes.bar([point.name for point in bars], heights, bottom=bottom, color=_COLOURS[kind], label=lever)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set_ylabel("MB saved by")
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1), columnspacing=1)


def _plans(front: Front) -> Sequence[Point]:
    return sorted((point for point in front.points if point.kind == "plan"), key=front.takes)


def _shown(front: Front, point: Point) -> float:
    """What a point takes, in the axis's unit."""
    return front.takes(point) * (1000 if front.resource in ("decode", "prefill") else 1e-6)


def _threshold(front: Front) -> float:
    """Where the KL axis turns from linear to logarithmic: below it only the dense model lies."""
    return max(min((p.kl for p in front.points if p.kl > 0), default=1e-3), 1e-6)
