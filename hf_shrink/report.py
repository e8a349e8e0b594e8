"""What came of a run: sizes, times, notes, measurements. Data only."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class ShrinkReport:
    """Result of `shrink` or `shrink_checkpoint`.

    Attributes:
        seed: of everything random in the run.
        calibration: which data the statistics came from: "description" and what else is known of it; "object" where
            it was handed over in Python, so that no recipe can name it.
        parameters_before, parameters_after: logical parameters (a packed weight counts its unpacked elements).
        bytes_before, bytes_after: of all weights as stored, tied ones once; of the source's files without tensors that
            the model's class has no place for.
        seconds: wall time by phase ("plan", "calibrate", "solve", ...), and "total".
        trained: whether it was made while the model was trained, so that the recipe alone does not give it again.
        recoveries: what `recover_checkpoint` was given each time that it was of use; "data" is None of an object.
        portable: loads in stock transformers; `not_portable_because` says why when it does not.
        notes: what the user should know: resolved group sizes, grown damping, excluded choices.
        block_errors: relative squared output error by block path, compressed against dense function.
        evaluation: {"data", "dense": {metric: value}, "compressed": {metric: value}} when it was run.
        adapter: whether the figures are of the weights with the adapter in `adapter/` beside them.
        completions: {"prompt", "dense", "compressed"} each, when made.
        layout: what the dense model's blocks are made of (`reporting.layout.BlockLayout` each), to show the plan by.
        machine: what made it: processor, cores, memory, threads, device.
    """

    seed: int = 0
    calibration: dict[str, Any] = field(default_factory=dict)
    parameters_before: int = 0
    parameters_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    trained: bool = False
    recoveries: list[dict[str, Any]] = field(default_factory=list)
    portable: bool = True
    not_portable_because: list[str] = field(default_factory=list)
    adapter: bool = False
    notes: list[str] = field(default_factory=list)
    block_errors: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    completions: list[dict[str, str]] = field(default_factory=list)
    layout: list[dict[str, Any]] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def compression(self) -> float:
        """bytes_before / bytes_after."""
        return self.bytes_before / max(self.bytes_after, 1)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ShrinkReport:
        return cls(**data)
