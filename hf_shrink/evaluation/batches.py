"""One pass over batches of model inputs with the dense and the compressed model side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from hf_shrink.calibration.inputs import tokenizer_of
from hf_shrink.calibration.targets import IGNORED, WORDS, Batch, Hidden, Kind, Logits, cut_by_rows
from hf_shrink.evaluation.apart import add_apart
from hf_shrink.evaluation.divergence import Totals, is_score
from hf_shrink.evaluation.observed import Observed, same
from hf_shrink.evaluation.scored import Prepared, device_of, forward, length_of
from hf_shrink.evaluation.text_bytes import bytes_of_labels
from hf_shrink.progress import ProgressCallback
from hf_shrink.sharding import share

# Logits of one forward pass and model, in elements: sequences go in one by one where a batch would make more.
LOGITS = {"cpu": 2**25, "accelerator": 2**28}
TASKS = {"causal": "text-generation", "masked": "fill-mask", "seq2seq": "text2text-generation"}


@dataclass(frozen=True)
class Subjects:
    """Who is measured.

    Attributes:
        model, baseline: the compressed and the dense model; None: the model alone.
        processing, baseline_processing: tokenizer or processor of each; of the baseline only where it is another one.
    """

    model: Any
    baseline: Any
    processing: Any
    baseline_processing: Any

    @property
    def models(self) -> list[Any]:
        return [self.model] if self.baseline is None else [self.model, self.baseline]

    @property
    def apart(self) -> bool:
        """Whether the two read texts in different tokens."""
        return self.baseline is not None and self.baseline_processing is not None


@dataclass(frozen=True)
class Pass:
    """What came of a pass: columns, and the longest sequence in tokens."""

    observed: Observed
    context: int
    task: str


def pass_over(subjects: Subjects, kind: Kind, batches: Sequence[Batch], progress: ProgressCallback | None) -> Pass:
    """Run both models on every batch and keep a few numbers of each sequence."""
    prepared = Prepared.of(kind, subjects.model, subjects.processing)
    shared = share(len(batches))
    found: list[tuple[Totals, list[int], int]] = []
    for number, batch in enumerate(batches if subjects.apart else prepared.of_all(batches)):
        if number in shared.own:
            found.append(_over(subjects, prepared, batch))
            if progress is not None:
                progress("evaluate", len(found), len(shared.own))
    totals, context, sizes = Totals(), 0, _Bytes(kind, subjects.processing)
    for own, counts, length in shared.gather(found):
        totals.extend(own)
        sizes.counts += counts
        context = max(context, length)
    observed = _columns(totals, sizes)
    observed.missing = _reasons(totals, kind, prepared, subjects, sizes)
    return Pass(observed, context, TASKS.get(kind) or ("feature-extraction" if totals.cosine else "classification"))


def _over(subjects: Subjects, prepared: Prepared, batch: Batch) -> tuple[Totals, list[int], int]:
    """What a batch adds: totals and bytes of its sequences, and the length of the longest."""
    totals, sizes, length = Totals(), _Bytes(prepared.kind, subjects.processing), length_of(batch)
    if subjects.apart:
        tokenizers = tokenizer_of(subjects.processing), tokenizer_of(subjects.baseline_processing)
        models = subjects.model, subjects.baseline
        length = add_apart(totals, prepared, batch, models, tokenizers, sizes.add)
    else:
        for part in cut_by_rows(batch, _rows(subjects.model, prepared.kind, batch)):
            _add(totals, sizes, prepared.kind, part, subjects)
    return totals, sizes.counts, length


def _add(totals: Totals, sizes: _Bytes, kind: Kind, batch: Batch, subjects: Subjects) -> None:
    own = forward(kind, batch, subjects.model)
    dense = None if subjects.baseline is None else forward(kind, batch, subjects.baseline)
    if isinstance(own, Logits):
        other = dense if isinstance(dense, Logits) else None
        if is_score(own):
            totals.add_scores(own, other if other is not None and is_score(other) else None)
            return
        totals.add_logits(own, other)
        sizes.add(batch, own)
        labels = batch.get("labels")
        if kind == "other" and labels is not None and labels.shape == own.logits.shape[:1] and _classes(own, labels):
            totals.add_classes(own, other, labels)
    elif isinstance(dense, Hidden):
        totals.add_hidden(own, dense)


def _classes(own: Logits, labels: torch.Tensor) -> bool:
    """Whether there is one choice among classes for each sequence, and labels that name one."""
    return own.logits.shape[1] == 1 and own.logits.shape[2] > 1 and not labels.is_floating_point()


class _Bytes:
    """Bytes of the predicted text, where it is known."""

    def __init__(self, kind: Kind, processing: Any) -> None:
        self._tokenizer = tokenizer_of(processing) if kind in ("causal", "seq2seq") else None
        self._within = kind == "causal"  # predicted is the text that is read
        self.counts: list[int] = []
        self.known = self._tokenizer is not None

    def add(self, batch: Batch, own: Logits) -> None:
        if self._tokenizer is None:
            return
        labels = own.labels.cpu()
        ids = batch["input_ids"].cpu() if self._within else labels.clamp_min(0)
        if self._within:  # position t predicts token t + 1
            labels = F.pad(labels, (1, 0), value=IGNORED)
        self.counts += bytes_of_labels(self._tokenizer, ids, labels)


def _rows(model: Any, kind: Kind, batch: Batch) -> int:
    """How many sequences go through at once, so that their logits fit `LOGITS`."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    vocabulary: int | None = getattr(text, "vocab_size", None)
    if kind not in WORDS or vocabulary is None:
        return len(next(iter(batch.values())))
    target = batch.get("decoder_input_ids", batch.get("labels", batch.get("input_ids")))
    length = target.shape[1] if target is not None and target.dim() == 2 else 1
    return max(1, LOGITS["cpu" if device_of(model).type == "cpu" else "accelerator"] // (length * vocabulary))


def _columns(totals: Totals, sizes: _Bytes) -> Observed:
    observed = Observed()
    if sum(totals.predicted):
        observed.data["predicted"] = totals.predicted
        observed.model["nll"] = totals.nll
        if totals.baseline_nll:
            observed.baseline["nll"] = totals.baseline_nll
        if sum(sizes.counts):
            observed.data["bytes"] = sizes.counts
    if totals.compared:
        observed.data["compared"] = totals.compared
    for name in ("divergence", "agreeing", "cosine"):
        if getattr(totals, name):
            observed.between[name] = getattr(totals, name)
    if totals.scores:
        observed.model["score"] = totals.scores
        if totals.baseline_scores:
            observed.baseline["score"] = totals.baseline_scores
    if totals.labels:
        observed.data["reference"] = totals.labels
        sides = (observed.model, totals.choices), (observed.baseline, totals.baseline_choices)
        for columns, choices in sides:
            if choices:
                columns["prediction"] = choices
                columns["correct"] = same(choices, totals.labels)
    return observed


def _reasons(totals: Totals, kind: Kind, prepared: Prepared, subjects: Subjects, sizes: _Bytes) -> dict[str, str]:
    """Why a column is not there, by column."""
    name, compared = type(subjects.model).__name__, subjects.baseline is not None
    reasons: dict[str, str] = {}
    if not sum(totals.predicted):
        reasons["nll"] = f"{name} predicts no tokens"
        if kind == "masked" and prepared.mask_id is None:
            reasons["nll"] = "a masked model needs its tokenizer's mask token; pass tokenizer="
    reasons["bytes"] = (
        "the bytes of the text are only known with a tokenizer; pass tokenizer="
        if kind in ("causal", "seq2seq") and not sizes.known
        else f"{name} does not predict a text one token after the other"
    )
    if not totals.divergence:
        reason = "needs the dense model as baseline"
        if compared:
            reason = f"{name} puts out hidden states and no distribution; cosine is given instead"
            if totals.scores:
                reason = f"{name} puts out one number and no distribution; score_agreement is given instead"
            elif not totals.cosine:
                reason = "the two models put out different numbers of classes, or only one class"
        reasons["divergence"] = reasons["agreeing"] = reason
    if not totals.cosine:
        reasons["cosine"] = f"{name} has logits, which say more" if compared else "needs the dense model as baseline"
    for column in ("prediction", "correct", "reference"):
        reasons[column] = "the batches have no `labels` with one class for each sequence"
    return reasons
