"""What was measured of a model: what every scheme, every unit and every block is worth to its predictions; on disk.

In one currency: nats a prediction of KL divergence to the dense model (1 - cos where it predicts nothing).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_shrink.errors import CheckpointError
from hf_shrink.ops.removal import RemovalCurve
from hf_shrink.plan import Scheme
from hf_shrink.pruning.curves import PartCurves

FORMAT = 3
_CURVE = ("order", "losses", "alone")


@dataclass(frozen=True)
class Rounding:
    """What rounding costs a piece.

    Attributes:
        damage: nats, by scheme (as asked: its group size may not divide a width).
        units: float64 (units,), the share of that which each unit of the piece's part (query heads, channels) makes, so
            that less is left of it when units go; None of matrices without a role.
    """

    damage: Mapping[Scheme, float]
    units: Tensor | None = None


@dataclass(frozen=True)
class Sensitivity:
    """All of it.

    Attributes:
        rounding: by name of the piece, see `pieces.py`.
        outer: nats, by path of an embedding or head and scheme.
        curves: nats that units cost, by stack, block and part.
        dropped: nats that it costs to leave out a block (part None) or a part of it.
        factors: measured over predicted damage of what was tried: the predictions are corrected by them already.
        seconds: that measuring took.
    """

    rounding: Mapping[str, Rounding]
    outer: Mapping[str, Mapping[Scheme, float]]
    curves: Mapping[tuple[str, int, str], PartCurves]
    dropped: Mapping[tuple[str, int, str | None], float]
    factors: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def save(self, path: Path, fingerprint: str) -> None:
        """Write it to one file, which is there whole or not at all."""
        tensors: dict[str, Tensor] = {}
        curves: list[list[Any]] = []
        for number, (key, found) in enumerate(self.curves.items()):
            curves.append([*key, found.groups is not None])
            for name, curve in (("units", found.units), ("groups", found.groups)):
                if curve is not None:
                    tensors |= {f"curve.{number}.{name}.{f}": getattr(curve, f).contiguous() for f in _CURVE}
        for number, rounding in enumerate(self.rounding.values()):
            if rounding.units is not None:
                tensors[f"rounding.{number}"] = rounding.units.contiguous()
        about = {
            "rounding": {name: _pairs(rounding.damage) for name, rounding in self.rounding.items()},
            "outer": {path: _pairs(damage) for path, damage in self.outer.items()},
            "curves": curves,
            "dropped": [[*key, value] for key, value in self.dropped.items()],
            "factors": dict(self.factors),
            "seconds": self.seconds,
        }
        metadata = {"format": str(FORMAT), "fingerprint": fingerprint, "about": json.dumps(about)}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        save_file(tensors or {"empty": torch.zeros(1)}, partial, metadata)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> Sensitivity | None:
        """What `save` wrote; None where there is none, or one of something else (another fingerprint or format).

        Raises:
            CheckpointError: the file is damaged.
        """
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != str(FORMAT) or metadata.get("fingerprint") != fingerprint:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            about = json.loads(metadata["about"])
            return cls(
                rounding={
                    name: Rounding(_schemes(pairs), tensors.get(f"rounding.{number}"))
                    for number, (name, pairs) in enumerate(about["rounding"].items())
                },
                outer={name: _schemes(pairs) for name, pairs in about["outer"].items()},
                curves={
                    (stack, index, part): PartCurves(
                        _curve(tensors, f"curve.{number}.units"),
                        _curve(tensors, f"curve.{number}.groups") if grouped else None,
                    )
                    for number, (stack, index, part, grouped) in enumerate(about["curves"])
                },
                dropped={(stack, index, part): value for stack, index, part, value in about["dropped"]},
                factors=about["factors"],
                seconds=about["seconds"],
            )
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); delete it, and it is measured again") from error


def _pairs(damage: Mapping[Scheme, float]) -> list[Any]:
    return [[asdict(scheme), value] for scheme, value in damage.items()]


def _schemes(pairs: list[Any]) -> dict[Scheme, float]:
    return {Scheme(**scheme): value for scheme, value in pairs}


def _curve(tensors: Mapping[str, Tensor], prefix: str) -> RemovalCurve:
    return RemovalCurve(*(tensors[f"{prefix}.{name}"] for name in _CURVE))
