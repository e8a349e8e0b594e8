"""plots/*.png for slides and cards, drawn with matplotlib, which is an optional extra."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from hf_shrink.errors import RecipeError
from hf_shrink.reporting.figures import size
from hf_shrink.reporting.palette import BASE

MISSING = "plots/*.png were not drawn because matplotlib is not installed (pip install 'hf_shrink[report]')"
DENSE, COMPRESSED = BASE["light"]["dense"], BASE["light"]["accent"]


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def check_figure(path: str | Path) -> None:
    """Raises RecipeError where no figure could be written to `path`, before anything is computed for it."""
    path = Path(path)
    if path.suffix not in (".html", ".png"):
        raise RecipeError(f"{path.name}: figures are .png or .html files")
    if path.suffix == ".png" and not can_plot():
        raise RecipeError("a .png needs matplotlib (pip install 'hf_shrink[report]'); or name a .html file")


def save(figure: Any, path: Path) -> Path:
    """Write a figure in the format that the name ends in; returns the path."""
    # Without the version in its metadata, the same run gives the same file.
    figure.savefig(path, dpi=150, metadata={"Software": None} if path.suffix == ".png" else None)
    return path


def figure_of(width: float, height: float, columns: int) -> tuple[Any, list[Any]]:
    """A figure in inches and its axes, side by side."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = [figure.add_subplot(1, columns, 1 + column) for column in range(columns)]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_size(before: int, after: int) -> Any:
    """Stored bytes, dense above compressed."""
    figure, (axes,) = figure_of(6, 1.6, 1)
    bars = axes.barh(["Dense", "Compressed"], [before / 1e6, after / 1e6], color=[DENSE, COMPRESSED], height=0.6)
    axes.bar_label(bars, labels=[size(before), size(after)], padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("stored weights in MB")
    return figure


def draw_bars(values: dict[str, float], what: str) -> Any:
    """A bar a block, on a linear axis. `values`: by path of the block; `what`: they are."""
    figure, (axes,) = figure_of(max(5.0, 1.5 + 0.22 * len(values)), 2.8, 1)
    axes.bar(range(len(values)), list(values.values()), color=COMPRESSED)
    step = max(1, len(values) // 16)
    labels = [path.rsplit(".", 1)[-1] for path in values]
    axes.set_xticks(range(0, len(values), step), labels[::step])
    axes.set_xlabel("block")
    axes.set_ylabel(what)
    return figure


def draw_sensitivity(numbers: list[str], series: dict[str, tuple[str, tuple[float, ...]]]) -> Any:
    """Dots of each option over the blocks, on a logarithmic axis. `series`: colour and values by name."""
    figure, (axes,) = figure_of(max(5.0, 1.5 + 0.22 * len(numbers)), 3, 1)
    for name, (colour, values) in series.items():
        style = {"marker": "o", "markersize": 5, "linestyle": "", "markeredgecolor": BASE["light"]["soft"]}
        axes.plot(range(len(numbers)), values, color=colour, markeredgewidth=0.5, label=name, **style)
    axes.set_yscale("log")
    step = max(1, len(numbers) // 16)
    axes.set_xticks(range(0, len(numbers), step), numbers[::step])
    axes.set_xlabel("block")
    axes.set_ylabel("KL divergence in nats")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
