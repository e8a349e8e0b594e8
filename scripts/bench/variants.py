"""What the quality benchmark can measure: the dense model, ours by effort or method, and the peers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

DEFAULT_ITERATIONS = 200  # AutoRound's own default


@dataclass(frozen=True)
class Setting:
    """How weights are stored. Results are compared at equal settings only.

    Attributes:
        group: columns that share a scale; None where there are no groups of one size.
        kind: "int", or the name of a format that has no integers with scale and zero point.
    """

    bits: int
    group: int | None
    symmetric: bool = True
    kind: str = "int"

    @property
    def label(self) -> str:
        """For example W4g64, W2g64-asymmetric, W4g64-nf4."""
        group = f"g{self.group}" if self.group is not None else ""
        symmetry = "" if self.symmetric else "-asymmetric"
        return f"W{self.bits}{group}{symmetry}" + ("" if self.kind == "int" else f"-{self.kind}")

    def to_dict(self) -> dict[str, Any]:
        return {"bits": self.bits, "group": self.group, "symmetric": self.symmetric, "kind": self.kind}


@dataclass(frozen=True)
class Variant:
    """One measured process: "dense", one of ours, or a peer.

    Attributes:
        iterations: AutoRound's steps; None for all else.
    """

    name: str
    kind: Literal["dense", "effort", "method", "peer"]
    setting: Setting | None = None
    iterations: int | None = None

    @property
    def id(self) -> str:
        """The key of its result, such as best:W4g64; AutoRound with other than its default steps says how many."""
        steps = "" if self.iterations in (None, DEFAULT_ITERATIONS) else f"-{self.iterations}"
        return self.name + steps + (f":{self.setting.label}" if self.setting else "")

    def to_dict(self) -> dict[str, Any]:
        """What a result says about where it belongs."""
        body: dict[str, Any] = {"variant": self.id, "name": self.name, "kind": self.kind}
        if self.setting is not None:
            body["setting"] = self.setting.to_dict()
        if self.iterations is not None:
            body["iterations"] = self.iterations
        return body

    def recipe(self, samples: int, length: int) -> dict[str, Any] | None:
        """The recipe of one of ours; None for the dense model."""
        if self.setting is None:
            return None
        how = {self.kind: self.name}  # effort: best, or method: gptq
        stored = {
            "scheme": f"W{self.setting.bits}A16",
            "group_size": self.setting.group,
            "symmetric": self.setting.symmetric,
        }
        return {"calibration": {"samples": samples, "length": length}, "steps": [{"quantize": {**how, **stored}}]}


DENSE = Variant("dense", "dense")


def settings(bits: Iterable[int], group: int, asymmetric_bits: Iterable[int]) -> list[Setting]:
    """One setting for each of `bits`."""
    return [Setting(b, group, symmetric=b not in set(asymmetric_bits)) for b in dict.fromkeys(bits)]


def our_variants(efforts: Iterable[str], methods: Iterable[str], chosen: Sequence[Setting]) -> list[Variant]:
    """Ours, bits by bits."""
    named: list[tuple[str, Literal["effort", "method"]]] = [(e, "effort") for e in efforts]
    named += [(m, "method") for m in methods]
    return [Variant(name, kind, setting) for setting in chosen for name, kind in named]


def matching(names: Iterable[str], variants: Iterable[Variant]) -> set[str]:
    """Ids meant by `names`: an id, what stands before its colon, what stands after it, or a glob of one of these.

    Raises ValueError for a name that means none.
    """
    ids = [v.id for v in variants]
    found: set[str] = set()
    for name in names:
        means = {i for i in ids if any(fnmatchcase(part, name) for part in (i, *i.split(":")))}
        if not means:
            raise ValueError(f"{name!r} names no variant; there are: {', '.join(ids)}")
        found |= means
    return found


def to_run(
    variants: Sequence[Variant], done: Mapping[str, Any], only: Sequence[str] | None, rerun: Sequence[str]
) -> list[Variant]:
    """What is still to be measured, in order: what is missing within `only`, and what `rerun` names.

    The dense model comes first whenever it is missing, because every loss is relative to it.
    """
    again = matching(rerun, variants)
    wanted = matching(only, variants) if only is not None else {v.id for v in variants}
    missing = {i for i in wanted | {DENSE.id} if i not in done}
    return [v for v in variants if v.id in missing | again]
