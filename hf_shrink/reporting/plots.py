"""plots/*.png for slides and cards, drawn with matplotlib, which is an optional extra."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from hf_shrink.reporting.figures import BitGrid, Record, bit_grids, size

MISSING = "plots/*.png were not drawn because matplotlib is not installed (pip install 'hf_shrink[report]')"
DENSE, COMPRESSED = "#8c959f", "#0b6bcb"


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def write_plots(folder: str | Path, record: Record) -> list[Path]:
    """Write the plots that the report has data for into `folder`/plots, and return their paths.

    size.png (stored bytes), block_errors.png (relative squared output error by block), bits_STACK.png (bits by block
    and role). Without matplotlib nothing is written; `can_plot` tells.
    """
    if not can_plot():
        return []
    report, target = record.report, Path(folder) / "plots"
    figures: dict[str, Any] = {}
    if report.bytes_before and report.bytes_after:
        figures["size"] = _size(report.bytes_before, report.bytes_after)
    if report.block_errors:
        figures["block_errors"] = _block_errors(report.block_errors)
    for grid in bit_grids(record.plan):
        figures["bits_" + grid.stack.replace(".", "_")] = _bits(grid)
    if figures:
        target.mkdir(parents=True, exist_ok=True)
    return [save(figure, target / f"{name}.png") for name, figure in figures.items()]


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


def _figure(width: float, height: float) -> tuple[Any, Any]:
    figure, (axes,) = figure_of(width, height, 1)
    return figure, axes


def _size(before: int, after: int) -> Any:
    figure, axes = _figure(6, 1.8)
    bars = axes.barh(["Dense", "Compressed"], [before / 1e6, after / 1e6], color=[DENSE, COMPRESSED])
    axes.bar_label(bars, labels=[size(before), size(after)], padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("stored weights in MB")
    return figure


def _block_errors(errors: dict[str, float]) -> Any:
    figure, axes = _figure(max(5.0, 1.5 + 0.22 * len(errors)), 3)
    axes.bar(range(len(errors)), list(errors.values()), color=COMPRESSED)
    step = max(1, len(errors) // 16)
    labels = [path.rsplit(".", 1)[-1] for path in errors]
    axes.set_xticks(range(0, len(errors), step), labels[::step])
    axes.set_xlabel("block")
    axes.set_ylabel("relative squared output error")
    return figure


def _bits(grid: BitGrid) -> Any:
    figure, axes = _figure(2.5 + 0.3 * len(grid.blocks), 1 + 0.3 * len(grid.roles))
    values = [[float("nan") if bits is None else float(bits) for bits in line] for line in grid.bits]
    axes.imshow(values, cmap="viridis", vmin=2, vmax=8, aspect="equal")
    for i, line in enumerate(grid.bits):
        for j, bits in enumerate(line):
            shown, colour = ("-", "black") if bits is None else (str(bits), "white" if bits < 6 else "black")
            axes.text(j, i, shown, ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(grid.blocks)), list(map(str, grid.blocks)), fontsize=8)
    axes.set_yticks(range(len(grid.roles)), list(grid.roles), fontsize=8)
    axes.set_xlabel(f"block of {grid.stack}")
    axes.set_title("bits", fontsize=10)
    return figure
