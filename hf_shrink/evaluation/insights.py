"""What takes more than the forward passes that are made anyway: looked at only where a metric asks for it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from hf_shrink.calibration.targets import Batch, kind_of
from hf_shrink.evaluation.batches import Subjects
from hf_shrink.evaluation.costs import add_costs
from hf_shrink.evaluation.explanations import ATTENTION, ATTRIBUTION, attentions_agree, attributions_agree
from hf_shrink.evaluation.observed import Observed


def add_insights(observed: Observed, needed: Collection[str], subjects: Subjects, batches: Sequence[Batch]) -> None:
    """Add the columns among `needed` that explain both models' decisions or say what the models cost."""
    explained = {*ATTRIBUTION, *ATTENTION} & set(needed)
    if explained:
        _explain(observed, explained, subjects, batches)
    models = {"model": subjects.model}
    if subjects.baseline is not None:
        models["baseline"] = subjects.baseline
    add_costs(observed, needed, models)


def _explain(observed: Observed, needed: Collection[str], subjects: Subjects, batches: Sequence[Batch]) -> None:
    reason = "needs the dense model as baseline"
    if subjects.apart:
        reason = "the two models read a text in different tokens, which cannot be compared one by one"
    elif not batches:
        reason = "the task gives a model several inputs for one answer, which it does not explain"
    elif subjects.baseline is not None:
        kind = kind_of(subjects.model)
        arguments = (kind, batches, subjects.model, subjects.baseline)
        reason = f"{type(subjects.model).__name__} gives no attention maps that can be compared"
        if ATTRIBUTION[0] in needed:
            _add(observed, attributions_agree(*arguments), ATTRIBUTION)
        if ATTENTION[0] in needed and (found := attentions_agree(*arguments)) is not None:
            _add(observed, found, ATTENTION)
    for name in (ATTRIBUTION[0], ATTENTION[0]):
        observed.missing.setdefault(name, reason)


def _add(observed: Observed, found: dict[str, list[float]], names: tuple[str, str]) -> None:
    observed.between[names[0]], observed.data[names[1]] = found[names[0]], found[names[1]]
