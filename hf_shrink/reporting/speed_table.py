"""Speed and memory in the terminal: every model a line, how many times as fast as the dense ones below."""

from __future__ import annotations

import sys
from io import StringIO
from typing import TextIO

from rich.text import Text

from hf_shrink.reporting.figures import size
from hf_shrink.reporting.table import console_for, empty_table
from hf_shrink.speed_report import ModelSpeed, SpeedReport, Timing

# Task: heading, and whether its rate or its time is what one wants to know.
TASKS = {
    "decode": ("Decode", "rate"),
    "first token": ("First token", "time"),
    "prefill": ("Prefill", "rate"),
    "forward": ("Forward", "rate"),
    "long forward": ("Long forward", "rate"),
}
PLAIN_WIDTH = 150
PLURAL = {"token": "tokens", "pass": "passes"}


def print_speed(report: SpeedReport, *, file: TextIO | None = None) -> None:
    """Print what was measured to `file` (stdout): in colour on a terminal, as plain ASCII lines elsewhere."""
    file = file if file is not None else sys.stdout
    console, table = console_for(file, PLAIN_WIDTH), empty_table(file, report.source)
    tasks = [task for task in TASKS if any(task in model.timings for model in report.models.values())]
    with_memory = any(model.memory is not None for model in report.models.values())
    table.add_column("")
    for task in tasks:
        table.add_column(_heading(report, task), justify="right")
    table.add_column("CPU s\n/ token" if "decode" in tasks else "CPU s\n/ pass", justify="right")
    table.add_column("Weights", justify="right")
    if with_memory:
        for heading in ("Resident\nloaded", "Resident\nafter use", "Peak"):
            table.add_column(heading, justify="right")
    for name, model in report.models.items():
        cells = [name, *(_cell(model, task) for task in tasks), _cpu(model, tasks[0]), size(model.weight_bytes)]
        table.add_row(*map(Text, cells + _memory(model) * with_memory))
    console.print(table)
    for line in (*ratios(report, tasks), *_below(report)):
        console.print(Text(line))


def plain_speed(report: SpeedReport) -> str:
    """The same as text."""
    buffer = StringIO()
    print_speed(report, file=buffer)
    return buffer.getvalue()


def ratios(report: SpeedReport, tasks: list[str]) -> list[str]:
    """How many times as fast the compressed model is as each dense one: a line for each pair."""
    dense = [name for name in report.models if name.startswith("dense")]
    lines = []
    for name in report.models:
        for other in dense if name not in dense else ():
            parts = [f"{TASKS[task][0].lower()} {report.ratio(task, name, other):.2f}x" for task in tasks]
            lines.append(f"{name} against {other}: {', '.join(parts)}")
    return lines


def _heading(report: SpeedReport, task: str) -> str:
    name, shown = TASKS[task]
    unit = next(model.timings[task].unit for model in report.models.values())
    return f"{name}\n{f'{PLURAL[unit]}/s' if shown == 'rate' else 'ms'}"


def _cell(model: ModelSpeed, task: str) -> str:
    """The median with the least and the greatest."""
    timing = model.timings[task]
    spread = timing.per_second if TASKS[task][1] == "rate" else timing.milliseconds
    return f"{_short(spread.median)} [{_short(spread.low)}, {_short(spread.high)}]"


def _short(value: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _cpu(model: ModelSpeed, task: str) -> str:
    timing: Timing = model.timings[task]
    return f"{1 / timing.per_cpu_second.median:.3g}"


def _memory(model: ModelSpeed) -> list[str]:
    taken = model.memory
    return ["-"] * 3 if taken is None else [size(taken.loaded), size(taken.used), size(taken.peak)]


def _below(report: SpeedReport) -> list[str]:
    work, hardware = report.workload, report.about.get("hardware", {})
    where = (
        hardware.get("accelerator")
        or f"{hardware.get('processor', 'unknown processor')}, {report.threads} thread{'s' * (report.threads != 1)}"
    )
    first = (
        f"Medians of {work['repeats']} runs in turn [least, greatest]: prompt {work['prompt']}, then {work['new']} "
        f"tokens; long prompt {work['prefill']}; batch {work['batch']}; {where}."
    )
    lines = [first]
    if any(model.memory is not None for model in report.models.values()):
        lines.append("Resident: over an interpreter with the libraries imported, each model in a process of its own.")
    for name, model in report.models.items():
        if model.kernels:
            served = ", ".join(f"{kernel} {count}" for kernel, count in sorted(model.kernels.items()))
            lines.append(f"Kernels of {name}: {served}.")
    return [*lines, *(f"Note: {note}" for note in report.notes)]
