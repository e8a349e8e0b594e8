"""How fast models run and what they take in memory. Data only."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

FORMAT = 1


@dataclass(frozen=True)
class Spread:
    """A median with the least and the greatest of what it is the median of."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Timing:
    """Repeated runs of one task.

    Attributes:
        unit: what is counted: "token", or "pass" for a forward pass.
        amount: units in one run, all sequences of the batch together.
        seconds: wall seconds of each run.
        cpu_seconds: of each run, all threads of the process together.
    """

    unit: str
    amount: int
    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...]

    @property
    def per_second(self) -> Spread:
        """Units per second."""
        return Spread.of([self.amount / s for s in self.seconds])

    @property
    def milliseconds(self) -> Spread:
        """Of a run."""
        return Spread.of([1000 * s for s in self.seconds])

    @property
    def per_cpu_second(self) -> Spread:
        """Units per second of processor time."""
        return Spread.of([self.amount / s for s in self.cpu_seconds])

    def to_dict(self) -> dict[str, Any]:
        """The runs, and what they come to."""
        summary = {"per_second": asdict(self.per_second), "per_cpu_second": asdict(self.per_cpu_second)}
        return {**summary, "median_seconds": statistics.median(self.seconds), **_lists(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Timing:
        return cls(data["unit"], data["amount"], tuple(data["seconds"]), tuple(data["cpu_seconds"]))


def _lists(timing: Timing) -> dict[str, Any]:
    return {**asdict(timing), "seconds": list(timing.seconds), "cpu_seconds": list(timing.cpu_seconds)}


@dataclass(frozen=True)
class Memory:
    """What a process of its own takes over an interpreter with the libraries imported; bytes.

    Attributes:
        loaded: resident once the model is loaded.
        loading_peak: the most while it was loaded.
        used: resident after the first forward pass.
        peak: the most by then.
        device: what the accelerator's allocator holds after the first forward pass; None on the CPU.
        device_peak: the most of it so far.
    """

    loaded: int
    loading_peak: int
    used: int
    peak: int
    device: int | None = None
    device_peak: int | None = None


@dataclass(frozen=True)
class ModelSpeed:
    """One model, or one way to run it.

    Attributes:
        dtype: of what is not packed, and of the activations.
        weight_bytes: of all parameters and buffers, shared ones once.
        timings: by task: "decode" and "first token" (after the prompt), "prefill" (a long prompt to its first token);
            for models that do not generate "forward" over the prompt and "long forward".
        memory: None where it was not measured.
        kernels: how many modules with packed weights each kernel serves.
    """

    dtype: str
    weight_bytes: int
    timings: dict[str, Timing]
    memory: Memory | None = None
    kernels: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "timings": {task: timing.to_dict() for task, timing in self.timings.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelSpeed:
        timings = {task: Timing.from_dict(timing) for task, timing in data["timings"].items()}
        memory = None if data["memory"] is None else Memory(**data["memory"])
        return cls(data["dtype"], data["weight_bytes"], timings, memory, dict(data["kernels"]))


@dataclass
class SpeedReport:
    """Models side by side, their runs in turn.

    Attributes:
        source: folder or Hub id of the compressed model.
        models: by name, the dense ones first.
        workload: tokens, batch and repeats.
        device, threads: where it ran; threads of torch on the CPU.
        about: date, versions and hardware.
        notes: what the reader should know, such as what was left out and why.
    """

    source: str
    models: dict[str, ModelSpeed]
    workload: dict[str, Any]
    device: str
    threads: int
    about: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def ratio(self, task: str, model: str, other: str) -> float:
        """How many times as fast `model` does the task as `other`: by the medians of their wall seconds."""
        mine, theirs = (self.models[name].timings[task].per_second.median for name in (model, other))
        return mine / theirs

    def to_dict(self) -> dict[str, Any]:
        """As decoded JSON."""
        return {"format": FORMAT, **vars(self), "models": {name: m.to_dict() for name, m in self.models.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SpeedReport:
        """The inverse of `to_dict`."""
        fields = {key: value for key, value in data.items() if key != "format"}
        return cls(**{**fields, "models": {name: ModelSpeed.from_dict(m) for name, m in data["models"].items()}})
