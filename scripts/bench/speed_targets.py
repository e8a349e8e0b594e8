"""What the speed figures say: medians over all rounds, ratios, and which targets are met.

Everything here is computed from measured results, and never measured itself.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from common import library
from speed_variants import variant_id

Result = Mapping[str, Any]
Measure = Literal["decode", "decode per CPU second", "prefill", "weights", "loaded", "used"]
BYTES = ("weights", "loaded", "used")


@dataclass(frozen=True)
class Target:
    """`measure` of ours is at least (bytes: at most) `factor` times that of what it is compared `against`.

    Attributes:
        ours: the variant that it holds for.
        against: a variant's name; "fastest peer" (of those that are not compiled), "fastest peer of all", "fastest
            dense"; for bytes "packed", the bytes of the checkpoint.
        subject: the model that it holds for; None for both.
    """

    ours: str
    measure: Measure
    factor: float
    against: str
    subject: str | None = None

    @property
    def name(self) -> str:
        sign = "<=" if self.measure in BYTES else ">="
        return f"{self.measure} {sign} {self.factor:g} x {self.against}"


SMALL, LARGE = "smollm2-135m", "llama-1b-random"
TARGETS = (
    Target("ours", "decode", 2.2, "dense-bfloat16", SMALL),
    Target("ours", "decode", 3.0, "dense-bfloat16", LARGE),
    Target("ours", "decode", 1.3, "fastest peer"),
    Target("ours-compiled", "decode", 1.3, "fastest peer of all"),
    *(
        target
        for rival in ("llama.cpp-q4_1", "llama.cpp-q4_0")
        for target in (
            Target("ours", "decode per CPU second", 0.75, rival, SMALL),
            Target("ours-compiled", "decode per CPU second", 0.95, rival, SMALL),
            Target("ours", "decode per CPU second", 0.9, rival, LARGE),
        )
    ),
    Target("ours", "prefill", 1.0, "fastest dense"),
    *(Target("ours", measure, 1.15, "packed") for measure in BYTES),
)


def figures(result: Result) -> dict[str, Any]:
    """One variant's figures over all of its rounds: rates as median, least and greatest, bytes as medians."""
    kind = library("speed_report").Timing
    found: dict[str, Any] = {"rounds": len(result["rounds"])}
    for task in result["rounds"][0]["timings"]:
        parts = [part["timings"][task] for part in result["rounds"]]
        pooled = kind(
            parts[0]["unit"],
            parts[0]["amount"],
            tuple(s for part in parts for s in part["seconds"]),
            tuple(s for part in parts for s in part["cpu_seconds"]),
        )
        found[task] = _spread(pooled.milliseconds if task == "first token" else pooled.per_second)
        if task == "decode":
            found["decode per CPU second"] = _spread(pooled.per_cpu_second)
    found["weights"] = result["rounds"][0]["weight_bytes"]
    memories = [part["memory"] for part in result["rounds"] if part.get("memory")]
    for name in ("loaded", "used", "peak"):
        if memories:
            found[name] = statistics.median(memory[name] for memory in memories)
    return found


def _spread(spread: Any) -> dict[str, float]:
    return {key: round(getattr(spread, key), 4) for key in ("median", "low", "high")}


def summarise(results: Mapping[str, Result]) -> dict[str, dict[str, Any]]:
    """By variant: figures, for ours decode over dense bfloat16, and the verdicts on every target."""
    summary = {variant: figures(result) for variant, result in results.items()}
    for variant, result in results.items():
        subject, name = result["subject"], result["name"]
        beside = {r["name"]: summary[v] for v, r in results.items() if r["subject"] == subject}
        dense = beside.get("dense-bfloat16")
        if dense is not None and "decode" in dense:
            ratio = summary[variant]["decode"]["median"] / dense["decode"]["median"]
            summary[variant]["decode over dense bfloat16"] = round(ratio, 3)
        mine = [t for t in TARGETS if t.ours == name and t.subject in (None, subject)]
        if mine:
            rivals = [r for r in results.values() if r["subject"] == subject]
            summary[variant]["targets"] = [judge(target, result, rivals, summary) for target in mine]
    return summary


def judge(target: Target, result: Result, rivals: Sequence[Result], summary: Mapping[str, Any]) -> dict[str, Any]:
    """The verdict on one target; `met` is None where it cannot be told, and `reason` says why."""
    own = _value(summary[result["variant"]], target.measure)
    if target.measure in BYTES:
        rival, theirs = "packed bytes", result.get("packed_bytes")
    else:
        candidates = [r for r in rivals if _is_rival(target.against, r)]
        values = {r["variant"]: _value(summary[r["variant"]], target.measure) for r in candidates}
        rival = max(values, key=lambda v: values[v] or 0.0, default=target.against)
        theirs = values.get(rival)
        strangers = [r for r in candidates if r["about"]["hardware"] != result["about"]["hardware"]]
        if strangers:
            return {"target": target.name, "met": None, "reason": f"{rival} ran on other hardware"}
    if own is None or not theirs:
        return {"target": target.name, "met": None, "reason": f"{rival if own is not None else 'ours'} is not measured"}
    ratio = own / theirs
    met = ratio <= target.factor if target.measure in BYTES else ratio >= target.factor
    return {"target": target.name, "against": rival, "ratio": round(ratio, 3), "met": met}


def _is_rival(against: str, result: Result) -> bool:
    if against.startswith("fastest peer"):
        return result["kind"] == "peer" and (against.endswith("of all") or not result["compiled"])
    if against == "fastest dense":
        return bool(result["kind"] == "dense")
    return bool(result["variant"] == variant_id(result["subject"], against))


def _value(found: Mapping[str, Any], measure: str) -> float | None:
    value = found.get(measure)
    return value["median"] if isinstance(value, Mapping) else value
