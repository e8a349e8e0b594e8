"""From columns to figures: each metric over all rows, and over every group."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hf_shrink.errors import CalibrationError
from hf_shrink.evaluation.metrics import NAMES, MissingPackage, load_metric
from hf_shrink.evaluation.observed import BASELINE, Observed, Side

Figures = dict[str, Any]
LARGE = 5  # rows of a group, at least, for it to be the worst


class Metrics:
    """Metrics by name, loaded when they are first needed."""

    def __init__(self, cache: str) -> None:
        self._cache = cache
        self._loaded: dict[str, Any] = {}

    def get(self, name: str) -> Any:
        """Raises RecipeError for an unknown name, ShrinkError where it cannot be loaded."""
        if name not in self._loaded:
            self._loaded[name] = load_metric(name, self._cache)
        return self._loaded[name]

    def columns(self, wanted: Sequence[str] | None) -> set[str]:
        """What the metrics read that are wanted by name. Raises as `get`."""
        return {column for name in wanted or () for column in self.get(name).reads}

    def figures(self, observed: Observed, wanted: Sequence[str] | None, seed: int) -> Figures:
        """{"model": {metric: figure}, "baseline": ..., "skipped": {metric: reason}}, and "groups" where rows have some.

        Args:
            observed: what was seen.
            wanted: metrics by name; None: all that read what was seen and cost nothing more.
            seed: of the bootstrap.
        """
        figures: Figures = {"model": {}, "baseline": {}, "skipped": {}}
        compared = False
        for name, metric in self._those(wanted, figures["skipped"]):
            if observed.inputs(metric.reads, "model") is not None:
                compared |= _compares(metric, observed)
                _add(figures, name, metric, observed, seed)
            elif wanted is not None:
                figures["skipped"][name] = observed.why(metric.reads)
        if wanted and (observed.between or "score" in observed.baseline) and not compared:
            for name, metric in self._those(None, {}):
                if metric.stands_in and observed.inputs(metric.reads, "model") is not None:
                    _add(figures, name, metric, observed, seed)
                    break
        if observed.groups:
            of_groups = {name: self._of_groups(name, observed, seed) for name in figures["model"]}
            figures["groups"] = {name: found for name, found in of_groups.items() if found}
        return figures

    def _those(self, wanted: Sequence[str] | None, skipped: dict[str, str]) -> Iterator[tuple[str, Any]]:
        """The wanted metrics; None: all that cost nothing more, and into `skipped` those whose packages are missing."""
        for name in NAMES if wanted is None else dict.fromkeys(wanted):
            try:
                metric = self.get(name)
            except MissingPackage as error:
                if wanted is not None:
                    raise
                skipped[name] = str(error)
                continue
            if wanted is not None or not metric.costly:
                yield name, metric

    def _of_groups(self, name: str, observed: Observed, seed: int) -> Figures:
        """{"worst": group, "by_group": {group: {"rows", "model": figure, "baseline": figure}}} of one metric."""
        metric, by_group = self.get(name), {}
        for group in dict.fromkeys(observed.groups):
            part = observed.of_group(group)
            if group is None or part.inputs(metric.reads, "model") is None:
                continue
            found: Figures = {"model": {}, "baseline": {}, "skipped": {}}
            try:
                _add(found, name, metric, part, seed)
            except CalibrationError:
                continue  # nothing to score in this group; over all rows it would have been raised
            if name not in found["model"]:
                continue
            sides = {side: found[side][name] for side in ("model", "baseline") if name in found[side]}
            by_group[str(group)] = {"rows": observed.groups.count(group), **sides}
        if not by_group:
            return {}
        large = {group: found for group, found in by_group.items() if found["rows"] >= LARGE} or by_group
        sign = 1 if metric.better == "higher" else -1
        worst = min(large, key=lambda group: sign * large[group]["model"]["value"])
        return {"worst": worst, "by_group": by_group}


@contextmanager
def opened_metrics() -> Iterator[Metrics]:
    """Metrics to compute with, whose files are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="hf_shrink_metrics_") as cache:
        yield Metrics(cache)


def _compares(metric: Any, observed: Observed) -> bool:
    return any(name.startswith(BASELINE) or name in observed.between for name in metric.reads)


def _add(figures: Figures, name: str, metric: Any, observed: Observed, seed: int) -> None:
    sides: tuple[Side, Side] = ("model", "baseline")
    for side in sides:
        inputs = observed.inputs(metric.reads, side)
        if inputs is None:
            continue
        found = metric.compute(predictions=inputs[0], references=inputs[1], seed=seed)
        if math.isnan(found[metric.name]):
            figures["skipped"][name] = f"it is not defined on the {side}'s outputs, which are all the same"
            continue
        figures[side][name] = {"value": found[metric.name], "low": found["low"], "high": found["high"]}
