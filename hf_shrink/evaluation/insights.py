"""Explanations of decisions as columns for metrics: more than the forward passes that are made anyway."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from hf_shrink.calibration.targets import Batch, kind_of
from hf_shrink.evaluation.batches import Subjects
from hf_shrink.evaluation.explanations import ATTENTION, ATTRIBUTION, attentions_agree, attributions_agree
from hf_shrink.evaluation.observed import Observed


def add_explanations(
    observed: Observed, needed: Collection[str], subjects: Subjects, batches: Callable[[], Iterator[Batch]]
) -> None:
    """Add the columns among `needed` that explain both models' decisions.

    Args:
        batches: gives the inputs that are decided about; called only where they are needed, each time anew.
    """
    if not {*ATTRIBUTION, *ATTENTION} & set(needed):
        return
    reason = "needs the dense model as baseline"
    if subjects.apart:
        reason = "the two models read a text in different tokens, which cannot be compared one by one"
    elif next(batches(), None) is None:
        reason = "the task gives a model several inputs for one answer, which it does not explain"
    elif subjects.baseline is not None:
        kind = kind_of(subjects.model)
        models = subjects.model, subjects.baseline
        reason = f"{type(subjects.model).__name__} gives no attention maps that can be compared"
        if ATTRIBUTION[0] in needed:
            _add(observed, attributions_agree(kind, batches(), *models), ATTRIBUTION)
        if ATTENTION[0] in needed and (found := attentions_agree(kind, batches(), *models)) is not None:
            _add(observed, found, ATTENTION)
    for name in (ATTRIBUTION[0], ATTENTION[0]):
        observed.missing.setdefault(name, reason)


def _add(observed: Observed, found: dict[str, list[float]], names: tuple[str, str]) -> None:
    observed.between[names[0]], observed.data[names[1]] = found[names[0]], found[names[1]]
