"""What was seen of an evaluation: columns with one entry a row, which metrics read by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Column = list[Any]
Columns = dict[str, Column]
Side = Literal["model", "baseline"]
BASELINE = "baseline."


@dataclass
class Observed:
    """Columns by name, with one entry a sequence or row of data: a total, a count, an answer.

    Attributes:
        data: what belongs to the data: references, and over how many positions totals run.
        model, baseline: what each model made of it.
        between: what both together say: divergence, agreement.
        groups: the group of each row, where the data has groups.
        missing: why a column is not there, by name.
    """

    data: Columns = field(default_factory=dict)
    model: Columns = field(default_factory=dict)
    baseline: Columns = field(default_factory=dict)
    between: Columns = field(default_factory=dict)
    groups: Column = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    def column(self, name: str, side: Side) -> Column | None:
        """The column that a metric reads for one model's figure; None where there is none."""
        if name.startswith(BASELINE):
            return self.baseline.get(name.removeprefix(BASELINE)) if side == "model" else None
        own = self.model if side == "model" else self.baseline
        if name in own:
            return own[name]
        if name in self.between:
            return self.between[name] if side == "model" else None
        return self.data.get(name)

    def inputs(self, reads: tuple[str, str], side: Side) -> tuple[Column, Column] | None:
        """Predictions and references of a metric; None where it has no figure for that side."""
        first, second = (self.column(name, side) for name in reads)
        if first is None or second is None or not len(first):
            return None
        return first, second

    def why(self, reads: tuple[str, str]) -> str:
        """Why a metric that reads these columns has no figure."""
        for name in reads:
            if self.column(name, "model") is None:
                plain = name.removeprefix(BASELINE)
                known = self.missing.get(name, self.missing.get(plain))
                if known is None and name != plain and plain in self.model:
                    known = "needs the dense model as baseline"
                return known or f"nothing that was run gives {plain.replace('_', ' ')}"
        return "there is no row of data for it"

    def of_group(self, group: Any) -> Observed:
        """The rows of one group; columns with another number of rows (figures of a model as a whole) are left out."""
        rows = len(self.groups)
        index = [place for place, one in enumerate(self.groups) if one == group]

        def part(columns: Mapping[str, Column]) -> Columns:
            return {name: [column[i] for i in index] for name, column in columns.items() if len(column) == rows}

        return Observed(part(self.data), part(self.model), part(self.baseline), part(self.between))


def same(own: Iterable[Any], dense: Iterable[Any]) -> list[float]:
    """1 for each row on which two columns are the same, else 0."""
    return [float(one == other) for one, other in zip(own, dense, strict=True)]
