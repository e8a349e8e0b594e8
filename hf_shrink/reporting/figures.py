"""The figures of a report as text, the same for terminal, card and HTML."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from hf_shrink.plan import Plan
from hf_shrink.report import ShrinkReport

NOT_MEASURED = "-"
ADAPTED = (
    "The figures are of the weights with the adapter in `adapter/`, which hf_shrink puts on; without it the model is "
    "as it was before recovery."
)


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

    @property
    def versions(self) -> Mapping[str, str]:
        """Of the packages that made it."""


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
    "excess_loss": ("Excess loss", "nats a token more than the dense model's loss on the same text; 0 for a copy"),
    "bits_per_byte": ("Bits per byte", "negative log-likelihood in bits over the bytes of the text; lower is better"),
    "accuracy": ("Accuracy", "share of right answers; higher is better"),
    "f1": ("F1", "mean over classes of the harmonic mean of precision and recall; higher is better"),
    "entity_f1": ("Entity F1", "harmonic mean of precision and recall of whole entities; higher is better"),
    "exact_match": (
        "Exact match",
        "share of answers that are the reference, but for case, punctuation and articles; higher is better",
    ),
    "answer_f1": ("Answer F1", "words that answer and reference share, precision and recall; higher is better"),
    "rouge_l": ("ROUGE-L", "longest common run of words with the reference; higher is better"),
    "wer": ("Word error rate", "words to change over words of the reference; lower is better"),
    "rank_correlation": ("Rank correlation", "of scores with people's; higher is better"),
    "ndcg_at10": ("nDCG at 10", "discounted gain of the first ten found, of what is possible; higher is better"),
    "recall_at10": ("Recall at 10", "share of what there is to find among the first ten; higher is better"),
    "kl_divergence": ("KL divergence", "mean over positions of KL(dense || compressed) in nats; 0 for a perfect copy"),
    "top1_agreement": ("Top-1 agreement", "share of positions where both models rank the same output first"),
    "flip_rate": ("Flip rate", "share of answers that are right in one model and wrong in the other; 0 for a copy"),
    "score_agreement": ("Score agreement", "rank correlation of both models' scores; 1 for a perfect copy"),
    "cosine": ("Cosine agreement", "mean cosine between the last hidden states of both models; 1 for a perfect copy"),
    "attribution_fidelity": ("Attribution fidelity", "how far both models decide for the same inputs; 1 for a copy"),
    "attention_fidelity": ("Attention fidelity", "how far both models look at the same places; 1 for a perfect copy"),
    "latency": ("Latency", "of a forward pass over a made-up input, such as 128 tokens or an image; lower is better"),
    "peak_memory": ("Peak memory", "that the model took at most; lower is better"),
    "weight_bytes": ("Weights in memory", "bytes of parameters and saved buffers as they are held; lower is better"),
}


def metric_row(key: str) -> tuple[str, str]:
    """A metric's name for people, and what it is; the name alone of one that is not known here."""
    return METRIC_ROWS.get(key, (key.replace("_", " ").capitalize(), ""))


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
        dense, compressed = (f"{_with_spread(speed, key)} {speed['unit']}" for key in ("dense", "compressed"))
        found.append(Row(speed_name(speed), dense, compressed, f"{speedup(speed):.2f}x", SPEED_HINT))
    return found + _metric_rows(report.evaluation)


SPEED_HINT = (
    "batch 1, median of runs in turn [least, greatest] on the machine that made this report, the compressed model with "
    "the kernels that import hf_shrink brings"
)


def _with_spread(speed: Mapping[str, Any], key: str) -> str:
    low, high = speed.get("spread", {}).get(key, (None, None))
    return figure({"value": number(speed[key]), "low": low, "high": high})


def speed_name(speed: Mapping[str, Any]) -> str:
    """What was timed."""
    return "Decoding" if speed["unit"] == "tokens/s" else "Forward"


def speedup(speed: Mapping[str, Any]) -> float:
    """How many times as fast the compressed model is."""
    return number(speed["compressed"]) / number(speed["dense"])


def _metric_rows(evaluation: Mapping[str, Any]) -> list[Row]:
    found = []
    dense, compressed = evaluation.get("dense", {}), dict(evaluation.get("compressed", {}))
    if evaluation.get("excess_loss") is not None:
        compressed["excess_loss"] = evaluation["excess_loss"]
    for key in in_order({**compressed, **dense}):
        name, hint = metric_row(key)
        change = ""
        if key == "perplexity" and key in dense and key in compressed:
            change = f"{100 * (number(compressed[key]) / number(dense[key]) - 1):+.1f}%"
        found.append(Row(name, figure(dense.get(key), key), figure(compressed.get(key), key), change, hint))
    return found + _group_rows(evaluation.get("groups", {}))


def _group_rows(groups: Mapping[str, Any]) -> list[Row]:
    """Of each metric the group that fares worst."""
    found = []
    for key, said in groups.items():
        if not said:  # of no group that has figures
            continue
        worst = said["by_group"][said["worst"]]
        dense, compressed = (figure(worst.get(side), key) for side in ("baseline", "model"))
        hint = f"the worst of {len(said['by_group'])} groups, {worst['rows']} rows"
        found.append(Row(f"{metric_row(key)[0]}, group {said['worst']}", dense, compressed, "", hint))
    return found


def in_order(metrics: Iterable[str]) -> list[str]:
    """The order in which metrics are shown: those known here first."""
    there = list(metrics)
    return [key for key in METRIC_ROWS if key in there] + [key for key in there if key not in METRIC_ROWS]


def headline(report: ShrinkReport) -> str:
    """The result in a line: size, speed and quality, as far as they were measured; empty where nothing was."""
    parts = []
    if report.bytes_before and report.bytes_after:
        before, after = size(report.bytes_before), size(report.bytes_after)
        parts.append(f"{after} from {before} ({report.compression:.2f}x smaller)")
    evaluation = report.evaluation
    if evaluation.get("speed"):
        speed = evaluation["speed"]
        parts.append(f"{speed_name(speed).lower()} {speedup(speed):.2f}x as fast")
    dense, compressed = evaluation.get("dense", {}), evaluation.get("compressed", {})
    for key in in_order(compressed)[:1]:
        was = f" from {figure(number(dense[key]), key)}" if key in dense else ""
        name = metric_row(key)[0]
        name = name[0].lower() + name[1:] if name[1:2].islower() else name  # not of KL, F1
        parts.append(f"{name} {figure(number(compressed[key]), key)}{was}")
    return ", ".join(parts)


def figure(value: Any, key: str = "") -> str:
    """A number, or {"value", "low", "high"} with its interval in brackets. `key`: the metric that it is of."""
    shown = FORMS.get(key, "{:.4g}".format)
    if value is None:
        return NOT_MEASURED
    if not isinstance(value, Mapping):
        return shown(value)
    text = shown(value["value"])
    if value.get("low") is None or value.get("high") is None:
        return text
    return f"{text} [{shown(value['low'])}, {shown(value['high'])}]"


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


# How metrics are shown that are not bare numbers.
FORMS: Mapping[str, Callable[[float], str]] = {
    "latency": lambda seconds: f"{1000 * seconds:.3g} ms",
    "peak_memory": size,
    "weight_bytes": size,
}


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
        sentence += " Brackets of metrics hold the 95% bootstrap interval over sequences."
    return sentence


def skipped(evaluation: Mapping[str, Any]) -> list[str]:
    """Why a metric that was asked for is missing."""
    return [f"{metric_row(k)[0]} is not given: {why}." for k, why in evaluation.get("skipped", {}).items()]


def said_text(text: str) -> str:
    """What a model wrote, to be shown: that it wrote nothing is said."""
    return text.strip() or "(it ends at once)"


def display_name(record: Record) -> str:
    """A name for titles: the source's last part and the recipe's name."""
    last = re.split(r"[/\\]", record.source.rstrip("/\\"))[-1] or "model"
    return f"{last}-{record.recipe.get('name', 'shrunk')}"
