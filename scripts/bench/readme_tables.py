"""The README's tables: measured figures as Markdown, and nothing that was not measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from table import in_order

Result = Mapping[str, Any]

# Names of tools for people; the package whose version is given with them, by their name in the results.
TOOLS = {
    "llmcompressor-gptq": ("llm-compressor {} GPTQ", "llmcompressor"),
    "autoround": ("AutoRound {}", "auto-round"),
    "gptqmodel": ("GPTQModel {}", "gptqmodel"),
    "bitsandbytes-nf4": ("bitsandbytes {} NF4", "bitsandbytes"),
    "bitsandbytes-int8": ("bitsandbytes {} LLM.int8", "bitsandbytes"),
    "torchao-int4": ("torchao {} int4 (prototype)", "torchao"),
    "torchao-int8": ("torchao {} int8", "torchao"),
    "torchao-int4-compiled": ("torchao {} int4, `torch.compile`", "torchao"),
    "torchao-int8-compiled": ("torchao {} int8, `torch.compile`", "torchao"),
    "quanto-int4": ("quanto {} int4", "optimum-quanto"),
    "quanto-int8": ("quanto {} int8", "optimum-quanto"),
    "compressed-tensors": ("our W4 in stock transformers {}", "transformers"),
    "llama.cpp-q4_1": ("llama.cpp Q4_1 (llama-cpp-python {})", "llama-cpp-python"),
    "llama.cpp-q4_0": ("llama.cpp Q4_0 (llama-cpp-python {})", "llama-cpp-python"),
    "dense": ("dense, float32", ""),
    "dense-float32": ("dense, float32", ""),
    "dense-bfloat16": ("dense, bfloat16", ""),
    "ours": ("**hf_shrink**", ""),
    "ours-compiled": ("**hf_shrink**, `torch.compile`", ""),
}
# What pruning's variants are, for people.
PRUNED = {
    "wanda": "wanda's score for whole channels, as published",
    "block_influence": "ShortGPT's block influence, as published",
    "torchpruning": "Torch-Pruning {}, Taylor on channels",
    "obs": "**hf_shrink**, width: `obs`",
    "obs-no-refit": "**hf_shrink**, width: `obs` without refit",
    "obs-uneven": "**hf_shrink**, width: `obs`, `portable: false`",
    "kl_greedy": "**hf_shrink**, depth: `kl_greedy`",
    "evolve": "**hf_shrink**, depth: `evolve`, {minutes} minutes",
    "evolve-parts": "**hf_shrink**, depth: `evolve` with `parts: any`, {minutes} minutes",
    "both": "**hf_shrink**, half by `kl_greedy`, half by `obs`",
    "both-deep": "**hf_shrink**, five sixths by `kl_greedy`, the rest by `obs`",
    "both-uneven": "**hf_shrink**, half by `kl_greedy`, half by `obs`; `portable: false`",
    "both-searched": "**hf_shrink**, half by `evolve` with `parts: any`, {minutes} minutes, half by `obs`; "
    "`portable: false`",
}
# What a method of the older file is called today: where that was measured too, the older figure is left out.
TODAY = {"gptq": "balanced", "rtn": "rtn"}


@dataclass(frozen=True)
class Rated:
    """One row of quality: what it is, its bits, and its figures; None where there is none."""

    name: str
    bits: int | None
    perplexity: float
    losses: tuple[float | None, ...]
    seconds: float | None
    peak_mb: float | None
    megabytes: float | None
    threads: int
    commit: str
    ours: bool


def rated(quality: Mapping[str, Any], older: Mapping[str, Any]) -> list[Rated]:
    """All that was measured for quality, by bits from many to few and loss; `older`: a file of the first protocol.

    Raises StopIteration without the dense model.
    """
    results = {result["variant"]: result for result in quality["results"]}
    texts = list(quality["protocol"]["held_out"])
    rows = []
    for result in in_order(results):
        losses = quality["summary"].get(result["variant"], {}).get("excess_loss", {})
        size, setting = result.get("weight_bytes"), result.get("setting") or {}
        rows.append(
            Rated(
                name_of(result),
                setting.get("bits"),
                result["perplexity"][texts[0]],
                tuple(losses.get(text) for text in texts),
                result.get("seconds_with_loading"),
                result.get("peak_mb"),
                None if size is None else size / 1e6,
                result["threads"],
                result["about"]["commit"],
                result["kind"] in ("effort", "method"),
            )
        )
    known = {(result["name"], (result.get("setting") or {}).get("bits")) for result in results.values()}
    rows += [row for name, row in _older(older, len(texts)) if (name, row.bits) not in known]
    return sorted(rows, key=lambda row: (row.bits is not None, -(row.bits or 0), row.losses[0] or 0.0))


def _older(older: Mapping[str, Any], texts: int) -> Iterable[tuple[str, Rated]]:
    """Rows of methods, each with the name that it has today."""
    for result in older["results"]:
        if result.get("method") in TODAY:
            losses = (result["excess_loss"], *[None] * (texts - 1))
            figures = (result["seconds_with_loading"], result["peak_mb"], result["weight_bytes"] / 1e6)
            name = f"**hf_shrink**, `method: {result['method']}`"
            threads, commit = older["protocol"]["threads"], older["commit"]
            row = Rated(name, result["bits"], result["perplexity"], losses, *figures, threads, commit, True)
            yield TODAY[result["method"]], row


def name_of(result: Result) -> str:
    """A result's name for people."""
    if result["kind"] in ("effort", "method"):
        return f"**hf_shrink**, `{result['kind']}: {result['name']}`"
    name, package = TOOLS[result["name"]]
    version = str(result["about"]["versions"].get(package, "")).split("+")[0]
    return " ".join(name.format(version).split())


def quality_table(quality: Mapping[str, Any], older: Mapping[str, Any]) -> str:
    """Perplexity and excess loss, time and memory of making it, and bytes."""
    texts = list(quality["protocol"]["held_out"])
    headings = ["", "bits", f"perplexity, {texts[0]}", *(f"excess loss, {text}" for text in texts)]
    headings += ["seconds", "threads", "peak MB", "weights MB", "at commit"]
    rows = []
    for row in rated(quality, older):
        losses = [_digits(loss, 3) for loss in row.losses]
        threads = "" if row.seconds is None else str(row.threads)
        figures = [_digits(row.seconds), threads, _digits(row.peak_mb), _digits(row.megabytes), f"`{row.commit}`"]
        rows.append([row.name, str(row.bits or ""), f"{row.perplexity:.2f}", *losses, *figures])
    return markdown(headings, rows)


def speed_table(speed: Mapping[str, Any], subject: str) -> str:
    """Decoding with its spread, prefill and memory, from fast to slow."""
    headings = ["", "decode, tokens/s (least to greatest)", "x dense bf16", "prefill, tokens/s", "MB", "weights MB"]
    headings.append("at commit")
    rows = []
    for result in by_speed(speed, subject):
        found = speed["summary"][result["variant"]]
        decode = found["decode"]
        spread = f"{decode['median']:.1f} ({decode['low']:.1f} to {decode['high']:.1f})"
        times = _digits(found.get("decode over dense bfloat16"), 2)
        sizes = [_digits(None if found.get(key) is None else found[key] / 1e6) for key in ("used", "weights")]
        figures = [spread, times, _digits(found["prefill"]["median"]), *sizes, f"`{result['about']['commit']}`"]
        rows.append([name_of({**result, "kind": "peer"}), *figures])
    return markdown(headings, rows)


def by_speed(speed: Mapping[str, Any], subject: str) -> list[Result]:
    """The results of one model, from fast to slow."""
    found = [result for result in speed["results"] if result["subject"] == subject]
    return sorted(found, key=lambda result: -speed["summary"][result["variant"]]["decode"]["median"])


def pruning_table(pruning: Mapping[str, Any]) -> str:
    """Excess loss by how much was taken and then by loss, and what became faster."""
    texts = list(pruning["protocol"]["held_out"])
    headings = ["", "taken", *(f"excess loss, {text}" for text in texts), "decode", "prefill", "seconds", "at commit"]
    losses = pruning["summary"]["losses"]
    found = [result for result in pruning["results"] if result["variant"] in losses]
    rows = []
    for result in sorted(found, key=lambda r: (taken(r), sum(losses[r["variant"]]["excess_loss"].values()))):
        version = str(result["about"]["versions"].get("torch-pruning", ""))
        name = PRUNED[result["name"]].format(version, minutes=pruning["protocol"]["minutes"])
        loss = [_digits(losses[result["variant"]]["excess_loss"][text], 3) for text in texts]
        gains = [result.get("speed", {}).get(kind, {}).get("speedup") for kind in ("decode", "prefill")]
        faster = ["" if gain is None else f"{gain:.2f}x" for gain in gains]
        seconds = _digits(result.get("seconds_with_loading"))
        rows.append([name, f"{taken(result)}%", *loss, *faster, seconds, f"`{result['about']['commit']}`"])
    return markdown(headings, rows)


def taken(result: Result) -> int:
    """Percent of the blocks' parameters."""
    return int(result["variant"].partition(":")[2].rstrip("%"))


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose columns but the first are ranged right."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _digits(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"
