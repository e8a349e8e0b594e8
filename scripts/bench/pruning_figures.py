"""What the pruning benchmark's figures say: excess loss, ratios to what others do, targets; and the printed table."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

AS_PUBLISHED = ("wanda", "block_influence", "torchpruning")  # what ours is compared with


def summarise(results: Mapping[str, Any]) -> dict[str, Any]:
    """Excess loss by variant and text, and of ours the ratio to the best of what is compared at the same ratio."""
    if "dense" not in results:
        return {}
    dense = results["dense"]["perplexity"]
    losses = {
        name: {text: math.log(value / dense[text]) for text, value in result["perplexity"].items()}
        for name, result in results.items()
        if name != "dense"
    }
    summary: dict[str, Any] = {}
    for name, loss in losses.items():
        amount = name.partition(":")[2]
        rivals = [losses[f"{rival}:{amount}"] for rival in AS_PUBLISHED if f"{rival}:{amount}" in losses]
        summary[name] = {"excess_loss": loss}
        if results[name]["kind"] == "ours" and rivals:
            best = {text: min(rival[text] for rival in rivals) for text in loss}
            summary[name]["ratio"] = {text: loss[text] / best[text] for text in loss}
            summary[name]["compared_with"] = len(rivals)
    return {"losses": summary, "targets": targets(summary, results)}


def targets(summary: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked at 20%, with the figure found; absent where it was not measured."""
    found: dict[str, Any] = {}

    def judge(name: str, figures: Iterable[float], most: float) -> None:
        values = [round(value, 4) for value in figures]
        if values:
            found[name] = {"found": values, "at_most": most, "met": max(values) <= most}

    def ratios(names: Iterable[str]) -> list[float]:
        """Of the variant that is best on average over the texts."""
        rows = [list(summary[n]["ratio"].values()) for n in names if len(summary.get(n, {}).get("ratio", ())) > 0]
        return min(rows, key=sum, default=[])

    plain = ("obs:20%", "obs-uneven:20%", "kl_greedy:20%", "both:20%", "both-deep:20%", "both-uneven:20%")
    judge("loss at 20% to the best reference", ratios(plain), 0.4)
    judge("the same, with a search", ratios(("evolve:20%", "evolve-parts:20%", "both-searched:20%")), 0.33)
    pair = [summary.get(name, {}).get("excess_loss") for name in ("obs:20%", "obs-no-refit:20%")]
    if pair[0] and pair[1]:
        judge("refit to the same choice without it", [pair[0][text] / pair[1][text] for text in pair[0]], 0.5)
    speed = results.get("kl_greedy:20%", {}).get("speed")
    if speed:
        judge("seconds of depth 20% to dense", [1 / speed["decode"]["speedup"]], 1 / 1.2)
    return found


def show(results: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    texts = list(results["dense"]["perplexity"]) if "dense" in results else []
    table = Table(title="SmolLM2-135M pruned; loss: ln(perplexity / dense); in brackets: to the best reference")
    for heading in ("variant", *texts, "parameters", "decode", "prefill", "seconds", "peak MB"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for name, result in results.items():
        entry = summary.get("losses", {}).get(name, {})
        cells = [name]
        for text in texts:
            ratio = entry.get("ratio", {}).get(text)
            loss = entry.get("excess_loss", {}).get(text, 0.0)
            cells.append(f"{loss:.3f}" + ("" if ratio is None else f" ({ratio:.2f}x)"))
        cells.append(f"{result['parameters'] / 1e6:.1f}M" if "parameters" in result else "-")
        for kind in ("decode", "prefill"):
            speed = result.get("speed", {}).get(kind)
            cells.append("-" if speed is None else f"{speed['speedup']:.2f}x")
        cells += [f"{result[k]:.0f}" if k in result else "-" for k in ("seconds_with_loading", "peak_mb")]
        table.add_row(*cells)
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table)
    for name, verdict in summary.get("targets", {}).items():
        console.print(
            f"{name}: {verdict['found']}, at most {verdict['at_most']:.2f}: {['MISSED', 'met'][verdict['met']]}"
        )
