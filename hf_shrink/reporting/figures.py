"""The figures of a report as text, the same for terminal, card and HTML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from hf_shrink.plan import Plan
from hf_shrink.report import ShrinkReport

NOT_MEASURED = "-"


class Record(Protocol):
    """What a report is written from; `checkpoint.record.ShrinkRecord` is one."""

    @property
    def source(self) -> str:
        """Hub id or folder of the dense model."""

    @property
    def recipe(self) -> Mapping[str, Any]:
        """What was asked for, as `Recipe.to_dict` gives it."""

    @property
    def plan(self) -> Plan:
        """What was done."""

    @property
    def report(self) -> ShrinkReport:
        """What came of it."""


@dataclass(frozen=True)
class Row:
    """One line of the table. `hint` says what the figure is and which direction is good."""

    name: str
    dense: str
    compressed: str
    change: str
    hint: str


METRIC_ROWS = {
    "perplexity": ("Perplexity", "e to the mean negative log-likelihood of a token; lower is better"),
    "kl_divergence": ("KL divergence", "mean over positions of KL(dense || compressed) in nats; 0 for a perfect copy"),
    "top1_agreement": ("Top-1 agreement", "share of positions where both models rank the same output first"),
    "cosine": ("Cosine agreement", "mean cosine between the last hidden states of both models; 1 for a perfect copy"),
}


def rows(report: ShrinkReport) -> list[Row]:
    """What was measured, dense beside compressed; what was not is left out."""
    found: list[Row] = []
    if report.bytes_before and report.bytes_after:
        times = f"{report.compression:.2f}x smaller"
        hint = "all weights as stored, tied ones once"
        found.append(Row("Size", size(report.bytes_before), size(report.bytes_after), times, hint))
    if report.parameters_before and report.parameters_after:
        before, after = report.parameters_before, report.parameters_after
        change = "same" if before == after else f"{100 * (after / before - 1):+.1f}%"
        hint = "a quantized weight counts its unpacked elements"
        found.append(Row("Parameters", count(before), count(after), change, hint))
    speed = report.evaluation.get("speed")
    if speed:
        name = "Decoding" if speed["unit"] == "tokens/s" else "Forward"
        dense, compressed = (f"{speed[key]:.3g} {speed['unit']}" for key in ("dense", "compressed"))
        hint = "batch 1, median, both models in turn on the machine that made this report"
        found.append(Row(name, dense, compressed, f"{speed['compressed'] / speed['dense']:.2f}x", hint))
    return found + _metric_rows(report.evaluation)


def _metric_rows(evaluation: Mapping[str, Any]) -> list[Row]:
    found = []
    dense, compressed = evaluation.get("dense", {}), evaluation.get("compressed", {})
    others = {key: (metric_name(key), "") for key in compressed if key not in METRIC_ROWS}
    for key, (name, hint) in {**METRIC_ROWS, **others}.items():
        if key not in compressed and key not in dense:
            continue
        change = ""
        excess = evaluation.get("excess_loss")
        if key == "perplexity" and excess is not None:
            change = f"excess loss {figure(excess)} nats"
        found.append(Row(name, figure(dense.get(key)), figure(compressed.get(key)), change, hint))
    return found


def metric_name(key: str) -> str:
    """What a metric is called."""
    return METRIC_ROWS[key][0] if key in METRIC_ROWS else key.replace("_", " ").capitalize()


def figure(value: Any) -> str:
    """A number, or {"value", "low", "high"} with its interval in brackets."""
    if value is None:
        return NOT_MEASURED
    if not isinstance(value, Mapping):
        return f"{value:.4g}"
    text = f"{value['value']:.4g}"
    if value.get("low") is None or value.get("high") is None:
        return text
    return f"{text} [{value['low']:.4g}, {value['high']:.4g}]"


def number(value: Any) -> float:
    """The bare number of a figure."""
    return float(value["value"] if isinstance(value, Mapping) else value)


def size(amount: float) -> str:
    """Bytes in decimal units, three digits: 173 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if amount < 999.5:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} TB"


def count(amount: float) -> str:
    """Three digits with K, M, B."""
    for unit in ("", "K", "M"):
        if amount < 999.5:
            return f"{amount:.3g}{unit}"
        amount /= 1000
    return f"{amount:.3g}B"


def measured_on(evaluation: Mapping[str, Any]) -> str:
    """One sentence on the data, or that nothing was measured: a figure without this means little."""
    if not evaluation.get("compressed"):
        return "The quality of this model was not measured."
    parts = [f"Measured on {evaluation.get('data', 'unnamed data')}"]
    if evaluation.get("tokens"):
        parts.append(f"{evaluation['tokens']:,} scored tokens or positions")
    if evaluation.get("sequences"):
        parts.append(f"{evaluation['sequences']} sequences")
    if evaluation.get("context"):
        stride = evaluation.get("stride")
        windows = "windows independent" if stride is None else f"windows {stride} tokens apart"
        parts.append(f"context {evaluation['context']}, {windows}")
    sentence = ", ".join(parts) + "."
    if any(isinstance(v, Mapping) and v.get("low") is not None for v in evaluation["compressed"].values()):
        sentence += " Brackets hold the 95% bootstrap interval over sequences."
    return sentence


def skipped(evaluation: Mapping[str, Any]) -> list[str]:
    """Why a metric that was asked for is missing."""
    return [f"{metric_name(k)} is not given: {why}." for k, why in evaluation.get("skipped", {}).items()]


def display_name(record: Record) -> str:
    """A name for titles: the source's last part and the recipe's name."""
    last = re.split(r"[/\\]", record.source.rstrip("/\\"))[-1] or "model"
    return f"{last}-{record.recipe.get('name', 'shrunk')}"


@dataclass(frozen=True)
class BitGrid:
    """Bits of the quantized weights: `bits[i][j]` of role i in block j, None where that weight is not quantized."""

    stack: str
    blocks: tuple[int, ...]
    roles: tuple[str, ...]
    bits: tuple[tuple[int | None, ...], ...]


def bit_grids(plan: Plan) -> list[BitGrid]:
    """One grid a stack, from the module paths alone: stack path, block number, path inside the block."""
    found: dict[str, dict[tuple[str, int], int]] = {}
    for path, weight_bits in plan.bits.items():
        match = re.fullmatch(r"(.+?)\.(\d+)\.(.+)", path)
        if match:
            found.setdefault(match[1], {})[match[3], int(match[2])] = weight_bits
    grids = []
    for stack, cells in found.items():
        blocks = tuple(sorted({block for _, block in cells}))
        roles = tuple(dict.fromkeys(role for role, _ in cells))
        bits = tuple(tuple(cells.get((role, block)) for block in blocks) for role in roles)
        grids.append(BitGrid(stack, blocks, roles, bits))
    return grids


def bits_outside_blocks(plan: Plan) -> dict[str, int]:
    """Bits by path of the quantized weights that belong to no block, such as embeddings."""
    return {path: bits for path, bits in plan.bits.items() if not re.fullmatch(r".+?\.\d+\..+", path)}
