"""The quality benchmark's figures as one table in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from targets import SECONDS, by_target

FILE_WIDTH = 160  # columns where the output is no terminal
WORDS = {True: "met", False: "MISSED", None: "not measured"}


def show(results: Mapping[str, Any], summary: Mapping[str, Any], not_run: Mapping[str, str]) -> None:
    """Print every result by setting, then what was not run and why."""
    from rich.console import Console
    from rich.table import Table

    texts = list(next(iter(results.values()))["perplexity"]) if results else []
    table = Table(title="SmolLM2-135M; in brackets: ratio to the best peer with the same bits, group and symmetry")
    headings = ["variant", "MB", *(f"loss {text}" for text in texts), "seconds", "peak MB", "targets"]
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("variant", "targets") else "right")
    setting = None
    for result in in_order(results):
        if result.get("setting") != setting and table.rows:
            table.add_section()
        setting = result.get("setting")
        table.add_row(*row(result, summary.get(result["variant"], {}), texts))
    for name, reason in not_run.items():
        table.add_row(f"[dim]{name}[/]", *["-"] * (len(headings) - 2), reason)
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    console.print(table)
    commits = sorted({str(result["about"]["commit"]) for result in results.values()})
    console.print(f"measured at {', '.join(commits) or 'no'} commit; loss: ln(perplexity / dense perplexity)")


def in_order(results: Mapping[str, Any]) -> list[Any]:
    """The dense model, then by bits from many to few, symmetry and group; ours before the peers."""

    def place(result: Mapping[str, Any]) -> tuple[Any, ...]:
        setting = result.get("setting")
        if setting is None:
            return (0,)
        where = (-setting["bits"], not setting["symmetric"], setting["kind"], setting["group"] or 0)
        return (1, *where, result["kind"] == "peer")

    return sorted(results.values(), key=place)


def row(result: Mapping[str, Any], entry: Mapping[str, Any], texts: Sequence[str]) -> list[str]:
    """One result as cells: variant, bytes, loss per text, seconds, peak memory, targets."""
    size = result.get("weight_bytes")
    cells = [result["variant"], "-" if size is None else f"{size / 1e6:.1f}"]
    for text in texts:
        if "excess_loss" not in entry:
            cells.append(f"ppl {result['perplexity'][text]:.2f}")
            continue
        ratio = entry.get("ratio", {}).get(text)
        cells.append(f"{entry['excess_loss'][text]:.4f}" + ("" if ratio is None else f" ({ratio:.2f}x)"))
    cells.append(f"{result[SECONDS]:.0f}" if SECONDS in result else "-")
    cells.append(f"{result['peak_mb']:.0f}" if "peak_mb" in result else "-")
    cells.append("\n".join(judgements(entry)))
    return cells


def judgements(entry: Mapping[str, Any]) -> list[str]:
    """A line per target: met, missed or not measured, per text where they differ."""
    lines = []
    for name, verdicts in by_target(entry.get("targets", ())).items():
        words = [WORDS[verdict["met"]] for verdict in verdicts]
        if len(set(words)) == 1:
            lines.append(f"{name}: {words[0]}")
        else:
            parts = (f"{verdict['text']} {word}" for verdict, word in zip(verdicts, words, strict=True))
            lines.append(f"{name}: {', '.join(parts)}")
    return lines
