"""The speed benchmark's figures as one table in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

FILE_WIDTH = 170  # columns where the output is no terminal
WORDS = {True: "met", False: "MISSED", None: "not measured"}
ORDER = ("dense", "ours", "peer", "llama.cpp")
HEADINGS = (
    *("variant", "decode\ntokens/s", "x dense\nbf16", "decode\n/ CPU s", "first\ntoken ms", "prefill\ntokens/s"),
    *("weights\nMB", "loaded\nMB", "used\nMB", "peak\nMB", "targets"),
)


def show(results: Mapping[str, Any], summary: Mapping[str, Any], not_run: Mapping[str, str]) -> None:
    """Print every result, one model below the other, then what was not run and why."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Batch 1; median (least, greatest) of the runs; memory over the process with its libraries")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in ("variant", "targets") else "right")
    subject = None
    for result in sorted(results.values(), key=lambda r: (r["subject"] != "smollm2-135m", ORDER.index(r["kind"]))):
        if result["subject"] != subject and table.rows:
            table.add_section()
        subject = result["subject"]
        table.add_row(*row(result, summary[result["variant"]]))
    for name, reason in not_run.items():
        table.add_row(name, reason)
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    console.print(table)
    for variant, kernels in served(results).items():
        console.print(f"kernels of {variant}: {kernels}")
    commits = sorted({str(result["about"]["commit"]) for result in results.values()})
    console.print(f"measured at {', '.join(commits) or 'no'} commit")


def row(result: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """One variant as cells."""
    rates = [_spread(found.get("decode"))]
    rates.append(f"{found['decode over dense bfloat16']:.2f}" if "decode over dense bfloat16" in found else "-")
    rates += [_spread(found.get(name), brief=True) for name in ("decode per CPU second", "first token", "prefill")]
    sizes = [_megabytes(found.get(name)) for name in ("weights", "loaded", "used", "peak")]
    return [result["variant"], *rates, *sizes, "\n".join(map(_verdict, found.get("targets", ())))]


def served(results: Mapping[str, Any]) -> dict[str, str]:
    """Which kernels serve how many modules, by variant of ours."""
    found = {v: r["rounds"][-1].get("kernels") for v, r in results.items()}
    return {v: ", ".join(f"{name} {count}" for name, count in sorted(k.items())) for v, k in found.items() if k}


def _verdict(target: Mapping[str, Any]) -> str:
    ratio = "" if "ratio" not in target else f" ({target['ratio']:.2f})"
    return f"{target['target']}: {WORDS[target['met']]}{ratio or ' (' + target['reason'] + ')'}"


def _spread(value: Mapping[str, float] | None, brief: bool = False) -> str:
    if value is None:
        return "-"
    median, low, high = (f"{v:.0f}" if v >= 100 else f"{v:.3g}" for v in (value["median"], value["low"], value["high"]))
    return median if brief else f"{median} ({low}, {high})"


def _megabytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e6:.0f}"
