"""How big or how slow the result may be: `budget:` in a recipe, `--budget` on the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from hf_shrink.errors import RecipeError
from hf_shrink.registry import did_you_mean

UNITS: Mapping[str, Mapping[str, float]] = {
    "bytes": {
        "": 1,
        "b": 1,
        "kb": 1e3,
        "mb": 1e6,
        "gb": 1e9,
        "tb": 1e12,
        "kib": 2**10,
        "mib": 2**20,
        "gib": 2**30,
        "tib": 2**40,
    },
    "seconds": {"s": 1, "ms": 1e-3, "us": 1e-6},
}
EXAMPLES = {"bytes": "30% or 120MB", "seconds": "60% or 25ms"}
LATENCIES = ("decode", "prefill")


@dataclass(frozen=True)
class Limit:
    """At most a share of what the dense model takes, or at most an amount. Exactly one is set.

    Attributes:
        share: above 0, up to 1.
        amount: in bytes or seconds, by what is limited.
        measure: "bytes" or "seconds".
    """

    share: float | None
    amount: float | None
    measure: str

    @classmethod
    def parse(cls, value: Any, measure: str, where: str) -> Limit:
        """From "30%", "120MB", "25ms" or a number of bytes. Raises RecipeError naming `where`."""
        found = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*(%|[a-z]*)", str(value).strip().lower())
        if found is None or isinstance(value, bool):
            raise RecipeError(f"{where} is a size such as {EXAMPLES[measure]}, not {value!r}")
        number, unit = float(found[1]), found[2]
        if unit == "%":
            if not 0 < number <= 100:
                raise RecipeError(f"{where} {value!r}: a share is above 0% and at most 100% of the dense model's")
            return cls(number / 100, None, measure)
        if unit not in UNITS[measure]:
            hint = did_you_mean(unit, ["%", *filter(None, UNITS[measure])])
            raise RecipeError(f"{where} {value!r} has an unknown unit; {hint} For example {EXAMPLES[measure]}")
        if number <= 0 or (measure == "bytes" and unit in ("", "b") and number < 1):
            hint = f"; for a share write {100 * number:g}%" if 0 < number < 1 else ""
            raise RecipeError(f"{where} {value!r} is no size{hint}")
        return cls(None, number * UNITS[measure][unit], measure)

    def of(self, dense: float) -> float:
        """The limit in bytes or seconds, where the dense model takes `dense`."""
        return self.share * dense if self.share is not None else float(self.amount or 0.0)

    def to_data(self) -> str | int:
        """The form that `parse` reads."""
        if self.share is not None:
            return f"{round(100 * self.share, 9):.12g}%"
        assert self.amount is not None
        return int(self.amount) if self.measure == "bytes" else f"{1000 * self.amount:.9g}ms"


@dataclass(frozen=True)
class Budget:
    """What the result may take; everything that is set must hold.

    Attributes:
        bytes: of all weights as stored.
        decode: seconds of writing one token at batch 1 on this device.
        prefill: seconds for each token of a prompt that is read at once, on this device.
        memory: weights as stored, and the KV cache of one sequence of `context` tokens. Layers with windows count as if
            they kept all tokens; what a decoder keeps of its encoder's output is not counted, because a budget does
            not say how many tokens the encoder reads.
        context: tokens; None: 4096, or as many as the model takes.
    """

    bytes: Limit | None = None
    decode: Limit | None = None
    prefill: Limit | None = None
    memory: Limit | None = None
    context: int | None = None

    def __post_init__(self) -> None:
        if not self.resources:
            raise RecipeError("the budget is empty; give at least one of bytes, latency and memory, such as bytes: 30%")
        if self.context is not None:
            if self.memory is None:
                raise RecipeError("budget.context says for how many tokens budget.memory counts; give memory with it")
            if not isinstance(self.context, int) or isinstance(self.context, bool) or self.context < 1:
                raise RecipeError(f"budget.context is a whole number of tokens, not {self.context!r}")

    @property
    def resources(self) -> tuple[str, ...]:
        """What it limits, of "bytes", "decode", "prefill" and "memory"."""
        return tuple(f.name for f in fields(self) if f.name != "context" and getattr(self, f.name) is not None)

    @property
    def timed(self) -> bool:
        """Whether it limits seconds."""
        return self.decode is not None or self.prefill is not None

    @classmethod
    def from_dict(cls, data: Any) -> Budget:
        """From the recipe's form: {bytes: 30%, latency: 60%, memory: 500MB, context: 4096}. Raises RecipeError."""
        if not isinstance(data, Mapping):
            raise RecipeError(f"budget must be a mapping such as {{bytes: 30%}}, not {data!r}")
        valid = ("bytes", "latency", "memory", "context")
        for key in data:
            if key not in valid:
                raise RecipeError(f"unknown key {key!r} in budget; {did_you_mean(str(key), valid)}")
        given = {key: value for key, value in data.items() if value is not None}
        made: dict[str, Any] = {}
        for key in ("bytes", "memory"):
            if key in given:
                made[key] = Limit.parse(given[key], "bytes", f"budget.{key}")
        latency = given.get("latency", {})
        latency = latency if isinstance(latency, Mapping) else {"decode": latency}
        for key, value in latency.items():
            if key not in LATENCIES:
                raise RecipeError(f"unknown key {key!r} in budget.latency; {did_you_mean(str(key), LATENCIES)}")
            if value is None:
                continue
            made[key] = Limit.parse(value, "seconds", f"budget.latency.{key}")
        return cls(**made, context=given.get("context"))

    def to_dict(self) -> dict[str, Any]:
        """The form that `from_dict` reads."""
        latency = {key: limit.to_data() for key in LATENCIES if (limit := getattr(self, key)) is not None}
        data = {
            "bytes": self.bytes.to_data() if self.bytes is not None else None,
            "latency": latency or None,
            "memory": self.memory.to_data() if self.memory is not None else None,
            "context": self.context,
        }
        return {key: value for key, value in data.items() if value is not None}

    def __str__(self) -> str:
        """For people: "bytes 30%, decode latency 60%"."""
        words = {"bytes": "bytes", "decode": "decode latency", "prefill": "prefill latency", "memory": "memory"}
        said = []
        for key, name in words.items():
            limit: Limit | None = getattr(self, key)
            if limit is not None:
                amount = limit.to_data()
                said.append(f"{name} {amount / 1e6:.6g}MB" if isinstance(amount, int) else f"{name} {amount}")
        return ", ".join(said) + (f" at {self.context} tokens" if self.context is not None else "")


def budget_data(options: Iterable[str]) -> dict[str, Any]:
    """The recipe's form of `--budget` options, for `Budget.from_dict`.

    "30%" and "120MB" are bytes; then "latency:60%" (of decoding; "latency:prefill:60%" and "latency:decode:60%" say
    which) and "memory:500MB", with "@8192" behind it for the context.

    Raises:
        RecipeError: an option that is none of these, or the same twice.
    """
    data: dict[str, Any] = {}

    def put(where: dict[str, Any], key: str, value: Any, option: str) -> None:
        if key in where:
            raise RecipeError(f"--budget {option}: there is a budget for {key} already")
        where[key] = value

    for option in options:
        *names, value = option.replace(" ", "").split(":")
        kind = names[0] if names else "bytes"
        if kind == "latency":
            put(data.setdefault("latency", {}), names[1] if len(names) > 1 else "decode", value, option)
        elif kind == "memory" and len(names) == 1:
            value, at, context = value.partition("@")
            put(data, "memory", value, option)
            if at:
                data["context"] = int(context) if context.isdigit() else context
        elif kind == "bytes" and len(names) <= 1:
            put(data, "bytes", value, option)
        else:
            hint = did_you_mean(kind, ("bytes", "latency", "memory"))
            raise RecipeError(
                f"--budget {option!r}: {hint} A budget is 30%, 120MB, latency:60%, latency:prefill:60%, memory:500MB "
                "or memory:500MB@8192"
            )
    return data
