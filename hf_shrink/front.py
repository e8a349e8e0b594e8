"""Size, speed and quality of plans side by side: data only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from hf_shrink.errors import RecipeError
from hf_shrink.paths import json_text
from hf_shrink.plan import Plan

FRONT_FORMAT = 1
Kind = Literal["dense", "uniform", "plan"]


@dataclass(frozen=True)
class Point:
    """One model: the dense one, one with the same bits everywhere, or a plan for a budget.

    Attributes:
        name: "dense", "W4", or the budget.
        bytes, memory: of the weights, and with the KV cache; `seconds`: per token by purpose where it was measured.
        kl: nats a prediction to the dense model, measured on held-out data with weights compressed one by one.
        perplexity: on the same data; None where the model predicts no tokens.
        predicted: the KL divergence that the predictions add up to.
        paid: bytes that bits, width and depth saved; `by_group`: the same by part of the model.
        plan: that a budget led to, in `Plan.to_json`'s form.
    """

    name: str
    kind: Kind
    bytes: int
    memory: int
    kl: float
    perplexity: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    predicted: float = 0.0
    paid: Mapping[str, float] = field(default_factory=dict)
    by_group: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    plan: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Front:
    """Points of one model on the same data.

    Attributes:
        source: what the model is called.
        resource: what the budgets were about: "bytes", "decode", "prefill" or "memory".
        data: what quality was measured on, in words.
        context: tokens in the KV cache, of `memory`.
        seconds: that it took: "sensitivity" once, "plans" all plans together.
        sensitivity: nats that each part of the model costs, by its name and what is done to it.
    """

    source: str
    resource: str
    points: tuple[Point, ...]
    data: str = ""
    context: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    sensitivity: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def takes(self, point: Point) -> float:
        """What a point takes of the resource."""
        found: float = getattr(point, self.resource) if self.resource in ("bytes", "memory") else 0.0
        return found or point.seconds[self.resource]

    def plan(self, name: str) -> Plan:
        """The plan of a budget, which keeps the points beside it for its report.

        Raises:
            RecipeError: there is none of that name.
        """
        for point in self.points:
            if point.name == name and point.plan is not None:
                plan = Plan.from_json(point.plan)
                points = tuple(replace(p, plan=None, by_group={}) for p in self.points)
                front = replace(self, points=points, sensitivity={})
                said = {"front": {**front.to_dict(), "chosen": name}, "sensitivity": dict(self.sensitivity)}
                return replace(plan, search={**plan.search, **said})
        known = ", ".join(point.name for point in self.points if point.plan is not None)
        raise RecipeError(f"there is no plan for {name!r}; there are plans for {known}")

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text, also written to `path` when given."""
        text = json.dumps({"front_format": FRONT_FORMAT, **self.to_dict()}, indent=1)
        if path is not None:
            Path(path).write_text(text + "\n")
        return text

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Front:
        """The inverse of `to_dict`; what it does not know is left out. Raises TypeError where points lack something."""
        known, own = ({f.name for f in fields(kind)} for kind in (Point, cls))
        points = tuple(Point(**{k: v for k, v in point.items() if k in known}) for point in data["points"])
        return cls(**{**{k: v for k, v in data.items() if k in own}, "points": points})

    @classmethod
    def from_json(cls, source: str | Path) -> Front:
        """From JSON text or a path. Raises RecipeError where it is not a front."""
        text = json_text(source, "front")
        try:
            data = json.loads(text)
            if data.pop("front_format", None) != FRONT_FORMAT:
                raise RecipeError("not a front of this format; make one with `hf-shrink plan --sweep`")
            return cls.from_dict(data)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise RecipeError(f"not a front: {error}") from error
