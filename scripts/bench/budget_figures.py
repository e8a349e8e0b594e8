"""The budget benchmark's targets, and what its results say about them."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Result = Mapping[str, Any]
WORDS = {True: "met", False: "MISSED", None: "not measured"}


@dataclass(frozen=True)
class Target:
    """One thing that is asked.

    Attributes:
        measure: "loss" is the ratio of our excess loss to the best rival's, per point and text; "bytes" ours over the
            budget, per point; "spearman" and "share" of the jobs of budget_job.py.
        most: the value must not be above it; for `least` not below.
    """

    name: str
    measure: Literal["loss", "bytes", "spearman", "share"]
    most: float | None = None
    least: float | None = None

    def met(self, value: float) -> bool:
        return (self.most is None or value <= self.most) and (self.least is None or value >= self.least)


TARGETS = (
    Target("excess loss at most 0.75 x the best of the others", "loss", most=0.75),
    Target("bytes never above the budget", "bytes", most=1.0),
    Target("predicted against true KL: Spearman at least 0.9", "spearman", least=0.9),
    Target("planning for a second budget: at most 5% of the first run", "share", most=0.05),
)


def losses(results: Mapping[str, Result]) -> dict[str, dict[str, float]]:
    """Excess loss by variant and text; empty without the dense model."""
    if "dense" not in results:
        return {}
    dense = results["dense"]["perplexity"]
    return {
        name: {text: math.log(value / dense[text]) for text, value in result["perplexity"].items()}
        for name, result in results.items()
        if name != "dense" and "perplexity" in result
    }


def summarise(results: Mapping[str, Result]) -> dict[str, Any]:
    """Excess losses, and a verdict for every target at every point; `met` is None where it cannot be told."""
    found = losses(results)
    verdicts: list[dict[str, Any]] = []
    points = list(dict.fromkeys(r["point"] for r in results.values() if r.get("point") is not None))
    for target in TARGETS:
        if target.measure in ("spearman", "share"):
            job = "predictions" if target.measure == "spearman" else "again"
            value = results[job][target.measure] if job in results else None
            verdicts.append(_verdict(target, value))
        for point in points if target.measure in ("loss", "bytes") else ():
            ours = f"ours:{point}"
            if ours not in results:
                verdicts.append(_verdict(target, None, point))
            elif target.measure == "bytes":
                verdicts.append(_verdict(target, results[ours]["weight_bytes"] / results[ours]["budget_bytes"], point))
            else:
                verdicts += _ratios(target, point, results, found)
    key = "perplexity_with_a_dense_table"
    alone = {name: {"perplexity": r[key]} for name, r in results.items() if key in r}
    dense_table = losses({**alone, "dense": results["dense"]}) if alone and "dense" in results else {}
    return {"excess_loss": found, "excess_loss_with_a_dense_table": dense_table, "targets": verdicts}


def _ratios(
    target: Target, point: str, results: Mapping[str, Result], found: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    rivals = [name for name, r in results.items() if r.get("point") == point and r["kind"] == "rival" and name in found]
    verdicts = []
    for text, loss in found.get(f"ours:{point}", {}).items():
        best = min(rivals, key=lambda name, text=text: found[name][text], default=None)
        value = loss / found[best][text] if best is not None and found[best][text] > 0 else None
        verdicts.append({**_verdict(target, value, point), "text": text, "against": best})
    return verdicts


def _verdict(target: Target, value: float | None, point: str | None = None) -> dict[str, Any]:
    limit = target.most if target.most is not None else target.least
    met = None if value is None else target.met(value)
    return {"target": target.name, "point": point, "value": value, "limit": limit, "met": met}


def show(results: Mapping[str, Result], summary: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    texts = list(results["dense"]["perplexity"]) if "dense" in results else []
    table = Table(title="SmolLM2-135M at a budget; loss: ln(perplexity / dense perplexity)")
    for heading in ("variant", "MB", "of budget", *(f"loss {text}" for text in texts), "seconds", "peak MB"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for name, result in results.items():
        if "perplexity" not in result:
            continue
        loss = summary["excess_loss"].get(name, {})
        budget = result.get("budget_bytes")
        table.add_row(
            name,
            f"{result['weight_bytes'] / 1e6:.1f}",
            f"{result['weight_bytes'] / budget:.1%}" if budget else "-",
            *(f"{loss[text]:.4f}" if text in loss else f"ppl {result['perplexity'][text]:.2f}" for text in texts),
            f"{result['seconds_with_loading']:.0f}" if "seconds_with_loading" in result else "-",
            f"{result['peak_mb']:.0f}" if "peak_mb" in result else "-",
        )
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table)
    for verdict in summary["targets"]:
        where = " ".join(str(verdict[key]) for key in ("point", "text") if verdict.get(key))
        value = "" if verdict["value"] is None else f" {verdict['value']:.3f}"
        console.print(f"{verdict['target']} {where}:{value} {WORDS[verdict['met']]}")
