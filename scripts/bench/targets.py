"""What the figures say: excess loss, ratios to the best peer at the same setting, and which targets are met.

Everything here is computed from measured results, and never measured itself. Excess loss is ln(perplexity / dense
perplexity), per held-out text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from variants import DEFAULT_ITERATIONS, DENSE

Result = Mapping[str, Any]
SECONDS = "seconds_with_loading"


@dataclass(frozen=True)
class Target:
    """`measure` of ours is at most `factor` times that of what it is compared `against`, at the same setting.

    Attributes:
        measure: "excess_loss" and "perplexity" are judged per held-out text, "seconds" (with loading) once.
        against: "best peer" (of that text), "dense", or a peer's name.
        bits: None for every number of bits.
        ours: the name it holds for; None for all of ours.
        below: strictly smaller is asked.
    """

    name: str
    measure: Literal["excess_loss", "perplexity", "seconds"]
    against: str
    factor: float = 1.0
    bits: int | None = None
    ours: str | None = None
    below: bool = False

    def applies(self, result: Result) -> bool:
        return self.bits in (None, result["setting"]["bits"]) and self.ours in (None, result["name"])


TARGETS = (
    Target("loss at most 0.7 x best peer", "excess_loss", "best peer", 0.7, bits=4),
    Target("loss at most 0.6 x best peer", "excess_loss", "best peer", 0.6, bits=3),
    Target("perplexity at most 1.5 x dense", "perplexity", "dense", 1.5, bits=2),
    Target("below AutoRound", "perplexity", "autoround", bits=2, below=True),
    Target("no slower than llm-compressor GPTQ", "seconds", "llmcompressor-gptq", ours="balanced"),
    Target("no slower than AutoRound at its defaults", "seconds", "autoround", ours="best"),
)


def summarise(results: Mapping[str, Result]) -> dict[str, dict[str, Any]]:
    """By variant: excess loss, and for ours the best peers, the ratios to them and the verdicts on every target.

    Empty without the dense model, to which every loss is relative.
    """
    if DENSE.id not in results:
        return {}
    dense = results[DENSE.id]
    losses = {
        variant: {text: math.log(value / dense["perplexity"][text]) for text, value in result["perplexity"].items()}
        for variant, result in results.items()
        if variant != DENSE.id
    }
    summary: dict[str, dict[str, Any]] = {}
    for variant, own in losses.items():
        entry: dict[str, Any] = {"excess_loss": own}
        result = results[variant]
        if result["kind"] != "peer":
            rivals = [r for r in results.values() if r["kind"] == "peer" and r["setting"] == result["setting"]]
            entry["best_peer"] = best_peers(rivals, losses, own)
            entry["ratio"] = {
                text: divided(loss, losses[entry["best_peer"][text]][text])
                for text, loss in own.items()
                if text in entry["best_peer"]
            }
            entry["targets"] = [
                verdict
                for target in TARGETS
                if target.applies(result)
                for verdict in judge(target, result, rivals, dense, losses, entry["best_peer"])
            ]
        summary[variant] = entry
    return summary


def best_peers(
    rivals: Iterable[Result], losses: Mapping[str, Mapping[str, float]], texts: Iterable[str]
) -> dict[str, str]:
    """The peer with the least excess loss, by text."""
    ids = [rival["variant"] for rival in rivals]
    return {text: min(ids, key=lambda i: losses[i][text]) for text in texts if ids}


def divided(ours: float, theirs: float) -> float | None:
    """The ratio of two excess losses; None where the peer lost nothing, so that no ratio means anything."""
    return round(ours / theirs, 4) if theirs > 0 else None


def judge(
    target: Target,
    result: Result,
    rivals: list[Result],
    dense: Result,
    losses: Mapping[str, Mapping[str, float]],
    best: Mapping[str, str],
) -> list[dict[str, Any]]:
    """One verdict per text, or one in all for seconds. `met` is None where it cannot be told, and `reason` says why."""
    if target.measure == "seconds":
        return [_judge_seconds(target, result, rivals)]
    verdicts = []
    perplexities = {r["variant"]: r["perplexity"] for r in (dense, *rivals)}
    for text in result["perplexity"]:
        if target.against == "dense":
            rival: str | None = DENSE.id
        elif target.against == "best peer":
            rival = best.get(text)
        else:
            rival = best_peers((r for r in rivals if r["name"] == target.against), losses, [text]).get(text)
        if rival is None:
            verdicts.append(_unknown(target, f"no {target.against} at this setting", text))
            continue
        if target.measure == "excess_loss":
            ours, theirs = losses[result["variant"]][text], losses[rival][text]
        else:
            ours, theirs = result["perplexity"][text], perplexities[rival][text]
        if theirs <= 0:
            verdicts.append(_unknown(target, f"{rival} lost nothing", text))
            continue
        verdicts.append(_verdict(target, ours, theirs, rival, text))
    return verdicts


def _judge_seconds(target: Target, result: Result, rivals: list[Result]) -> dict[str, Any]:
    steps = (None, DEFAULT_ITERATIONS)
    found = [r for r in rivals if r["name"] == target.against and r.get("iterations") in steps]
    if not found:
        return _unknown(target, f"no {target.against} at this setting and its defaults")
    (rival,) = found
    if rival["about"]["hardware"] != result["about"]["hardware"]:
        return _unknown(target, f"{rival['variant']} ran on other hardware")
    if rival["threads"] != result["threads"]:
        return _unknown(target, f"{rival['variant']} ran on {rival['threads']} threads, not {result['threads']}")
    return _verdict(target, result[SECONDS], rival[SECONDS], rival["variant"])


def _verdict(target: Target, ours: float, theirs: float, rival: str, text: str | None = None) -> dict[str, Any]:
    limit = target.factor * theirs
    met = ours < limit if target.below else ours <= limit
    return {"target": target.name, "text": text, "against": rival, "value": ours, "limit": limit, "met": met}


def _unknown(target: Target, reason: str, text: str | None = None) -> dict[str, Any]:
    return {"target": target.name, "text": text, "met": None, "reason": reason}


def by_target(verdicts: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Verdicts by target, in their order."""
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for verdict in verdicts:
        grouped.setdefault(verdict["target"], []).append(verdict)
    return grouped
