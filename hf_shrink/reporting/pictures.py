"""Which pictures a report has data for, each with a description for those who do not see it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_shrink.front import Front
from hf_shrink.reporting.figures import Record, size
from hf_shrink.reporting.front_chart import AXES, draw_front
from hf_shrink.reporting.layout import BlockLayout
from hf_shrink.reporting.palette import BASE, KEPT
from hf_shrink.reporting.plan_chart import by_stack, draw_plan
from hf_shrink.reporting.plan_rows import plan_rows
from hf_shrink.reporting.plots import can_plot, draw_bars, draw_sensitivity, draw_size, save
from hf_shrink.reporting.sensitivity import kind_of_option, predicted_by_block, sensitivity_of

FOLDER = "plots"


@dataclass(frozen=True)
class Picture:
    """A file below the report's folder, and what it shows."""

    path: str
    text: str


def write_pictures(folder: str | Path, record: Record) -> list[Picture]:
    """Write the pictures that the report has data for into `folder`/plots, and return them.

    size.png (stored bytes), plan.png (bits by block and role, and what is kept), block_errors.png (relative squared
    output error by block), sensitivity.png (what each block is worth), front.png (what other sizes cost). Without
    matplotlib nothing is written; `can_plot` tells.
    """
    if not can_plot():
        return []
    found = _drawn(record)
    if found:
        (Path(folder) / FOLDER).mkdir(exist_ok=True)
    for picture, figure in found:
        save(figure, Path(folder) / picture.path)
    return [picture for picture, _ in found]


def _drawn(record: Record) -> list[tuple[Picture, Any]]:
    report, found = record.report, []

    def add(name: str, text: str, figure: Any) -> None:
        found.append((Picture(f"{FOLDER}/{name}.png", text), figure))

    if report.bytes_before and report.bytes_after:
        before, after = report.bytes_before, report.bytes_after
        add("size", f"Stored weights: dense {size(before)}, compressed {size(after)}.", draw_size(before, after))
    rows = plan_rows(record.plan, [BlockLayout(**block) for block in report.layout])
    if rows:
        text = f"A map of the plan: for each of {len(rows)} blocks the bits of its matrices and what is kept of it."
        add("plan", text, draw_plan(by_stack(rows)))
    if report.block_errors:
        errors = report.block_errors
        worst = max(errors, key=lambda path: errors[path])
        text = f"Relative squared output error of {len(errors)} blocks; the largest is {errors[worst]:.3g} at {worst}."
        add("block_errors", text, draw_bars(errors, "relative squared output error"))
    _add_sensitivity(record, add)
    if "front" in record.plan.search:
        front = Front.from_dict(record.plan.search["front"])
        text = f"KL divergence to the dense model against {AXES[front.resource]}, of {len(front.points)} models."
        add("front", text, draw_front(front))
    return found


def _add_sensitivity(record: Record, add: Any) -> None:
    measured, predicted = sensitivity_of(record.plan), predicted_by_block(record.plan)
    if measured is not None:
        series = {name: (_colour(kind_of_option(name)), values) for name, values in measured.options.items()}
        text = f"KL divergence that each of {len(measured.blocks)} blocks would cost under {', '.join(series)}."
        add("sensitivity", text, draw_sensitivity(measured.numbers, series))
    elif predicted and max(predicted.values()) > 0:
        text = f"What is done to {len(predicted)} blocks was predicted to cost, in nats of KL divergence."
        add("sensitivity", text, draw_bars(predicted, "predicted cost"))


def _colour(kind: str) -> str:
    return KEPT["light"][int(kind[1:])] if kind[0] == "k" else BASE["light"][kind]
