"""Speed and memory as one picture, drawn with matplotlib, which is an optional extra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_shrink.errors import ShrinkError
from hf_shrink.reporting.plots import COMPRESSED, DENSE, can_plot, figure_of, save
from hf_shrink.reporting.speed_table import PLURAL, TASKS
from hf_shrink.speed_report import SpeedReport, Spread

KINDS = (".png", ".svg", ".pdf")


def check_plot(path: str | Path) -> None:
    """Raises ShrinkError where no picture could be written to `path`, before anything is measured for it."""
    if not can_plot():
        raise ShrinkError("a plot needs matplotlib, which is not installed: pip install 'hf_shrink[report]'")
    if Path(path).suffix not in KINDS:
        raise ShrinkError(f"{path} is no kind of picture that can be drawn; end its name in {', '.join(KINDS)}")


def write_speed_plot(path: str | Path, report: SpeedReport) -> Path:
    """Bars for every model: the rate of each task with least and greatest, and resident memory after use.

    The kind of file follows from its name; see `check_plot`.
    """
    names = list(report.models)
    panels: list[tuple[str, list[Spread]]] = []
    for task, (heading, shown) in TASKS.items():
        if shown == "rate" and all(task in model.timings for model in report.models.values()):
            timings = [model.timings[task] for model in report.models.values()]
            panels.append((f"{heading}, {PLURAL[timings[0].unit]}/s", [t.per_second for t in timings]))
    memories = [model.memory for model in report.models.values()]
    megabytes = [Spread(m.used / 1e6, m.used / 1e6, m.peak / 1e6) if m else Spread(0, 0, 0) for m in memories]
    if any(memories):
        panels.append(("Resident after use, up to the peak, MB", megabytes))
    figure, columns = figure_of(1.6 + 3.2 * len(panels), 0.9 + 0.4 * len(names), len(panels))
    colours = [DENSE if name.startswith("dense") else COMPRESSED for name in names]
    for axes, (heading, spreads) in zip(columns, panels, strict=True):
        _bars(axes, names, heading, spreads, colours)
    return save(figure, Path(path))


def _bars(axes: Any, names: list[str], heading: str, spreads: list[Spread], colours: list[str]) -> None:
    lengths = [s.median for s in spreads]
    reach = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
    axes.barh(names, lengths, xerr=reach, color=colours, ecolor="black", capsize=2)
    for place, spread in enumerate(spreads):
        axes.annotate(f"{spread.median:.3g}", (spread.high, place), (4, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_title(heading, fontsize=10)
    axes.tick_params(labelleft=axes.get_subplotspec().is_first_col())
