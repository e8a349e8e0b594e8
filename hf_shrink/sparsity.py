"""How many single weights become zero, and of what. Data only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_shrink.errors import RecipeError
from hf_shrink.values import check_switch


@dataclass(frozen=True)
class Amount:
    """How many weights of a matrix become zero; exactly one of these is given.

    Attributes:
        sparsity: the fraction that becomes zero, from 0 to 1.
        threshold: tau; every weight with an importance of at most tau becomes zero.
        pattern: "N:M", such as "2:4": of every M consecutive weights of a row, N are kept.
    """

    sparsity: float | None = None
    threshold: float | None = None
    pattern: str | None = None

    def __post_init__(self) -> None:
        if [self.sparsity, self.threshold, self.pattern].count(None) != 2:
            raise RecipeError("pruning weights takes exactly one of sparsity, threshold or pattern")
        if self.sparsity is not None and not (_is_number(self.sparsity) and 0 <= self.sparsity <= 1):
            raise RecipeError(f"sparsity must be from 0 to 1, not {self.sparsity!r}")
        if self.threshold is not None and not (_is_number(self.threshold) and self.threshold == self.threshold):
            raise RecipeError(f"threshold must be a number, not {self.threshold!r}")
        if self.pattern is not None:
            kept, size = self.numbers
            if not 0 < kept < size:
                raise RecipeError(f"pattern {self.pattern!r} keeps N of every M weights: N is at least 1 and below M")

    @property
    def numbers(self) -> tuple[int, int]:
        """N and M of the pattern. Raises RecipeError where it is none."""
        found = re.fullmatch(r"(\d+):(\d+)", str(self.pattern))
        if found is None:
            raise RecipeError(f'pattern is written "N:M", for example "2:4", not {self.pattern!r}')
        return int(found[1]), int(found[2])

    def __str__(self) -> str:
        if self.pattern is not None:
            return self.pattern
        return f"sparsity {self.sparsity:.4g}" if self.sparsity is not None else f"threshold {self.threshold:g}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class WeightsPlan:
    """Which matrices lose single weights. Which of a matrix's weights go is decided when it is reached.

    Attributes:
        method: name of the method, and its `options`.
        amounts: by path of the parameter **in the source model**.
        refit: whether what is kept is refitted by least squares, where the method has statistics.
    """

    method: str
    amounts: Mapping[str, Amount]
    options: Mapping[str, Any] = field(default_factory=dict)
    refit: bool = True

    def __post_init__(self) -> None:
        check_switch(self.refit, "weights.refit")

    @property
    def modules(self) -> list[str]:
        """Paths of the modules that own the weights."""
        return [path.rpartition(".")[0] for path in self.amounts]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WeightsPlan:
        """The inverse of `dataclasses.asdict`. Raises RecipeError, KeyError or TypeError where it is none."""
        amounts = {path: Amount(**amount) for path, amount in data["amounts"].items()}
        return cls(**{**data, "amounts": amounts})

    def summary(self) -> list[str]:
        """One line an amount: "12 weights to sparsity 0.5 by wanda"; weights that differ in sparsity share one."""
        counts: dict[str, list[float]] = {}
        for amount in self.amounts.values():
            key = str(amount) if amount.sparsity is None else "sparsity"
            counts.setdefault(key, []).append(amount.sparsity or 0.0)
        lines = []
        for key, found in counts.items():
            low, high = min(found), max(found)
            if key == "sparsity":
                key += f" {low:.4g}" if low == high else f" {low:.4g} to {high:.4g}"
            lines.append(f"{len(found)} weights to {key} by {self.method}")
        return lines
