"""Totals per sequence from two models' outputs, a few positions at a time so that memory stays low."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from hf_shrink.calibration.targets import IGNORED, Hidden, Logits
from hf_shrink.errors import CalibrationError
from hf_shrink.evaluation.scored import finite

# Logits handled at once, in elements: 4 MB in float32 stay in a CPU's cache (16 MB took three times as long).
CHUNK = {"cpu": 2**20, "accelerator": 2**24}


@dataclass
class Totals:
    """Per-sequence sums, float64, one entry a sequence.

    Attributes:
        predicted: how many tokens `nll` and `baseline_nll` (nats) run over.
        compared: how many positions `divergence` (nats), `agreeing` or `cosine` run over.
        labels: the right class of each sequence, where the data has one.
        choices, baseline_choices: the classes that the models choose for them.
        scores, baseline_scores: the numbers that heads for such put out, one for each sequence or several.
    """

    predicted: list[int] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    baseline_nll: list[float] = field(default_factory=list)
    compared: list[int] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)
    agreeing: list[float] = field(default_factory=list)
    cosine: list[float] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    choices: list[int] = field(default_factory=list)
    baseline_choices: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    baseline_scores: list[float] = field(default_factory=list)

    def add_logits(self, model: Logits, baseline: Logits | None) -> None:
        """Add a batch. `baseline`'s classes may differ in number, or be one: then only its likelihoods are taken.

        Log-softmax in float32, sums in float64. Raises CalibrationError for labels outside the output classes.
        """
        rows, width, classes = model.logits.shape
        sums = torch.zeros(4, rows, dtype=torch.float64, device=model.logits.device)
        comparable = baseline is not None and baseline.logits.shape == model.logits.shape and classes > 1
        chunk = CHUNK["cpu" if model.logits.device.type == "cpu" else "accelerator"]
        step = max(1, chunk // max(rows * classes, 1))
        complete = bool(model.positions.all())
        for start in range(0, width, step):
            window = slice(start, start + step)
            scored = model.positions[:, window]
            row = scored.nonzero()[:, 0]
            labels = model.labels[:, window][scored]
            own = _log_probabilities(model.logits[:, window], None if complete else scored)
            sums[0].index_add_(0, row, _nll(own, labels))
            if baseline is None:
                continue
            dense = _log_probabilities(baseline.logits[:, window].to(own.device), None if complete else scored)
            sums[1].index_add_(0, row, _nll(dense, labels))
            if comparable:
                sums[3].index_add_(0, row, (own.argmax(-1) == dense.argmax(-1)).double())
                sums[2].index_add_(0, row, F.kl_div(own, dense, reduction="none", log_target=True).sum(-1).double())
        self.predicted += (model.labels != IGNORED).sum(1).tolist()
        self.nll += sums[0].tolist()
        if baseline is not None:
            self.baseline_nll += sums[1].tolist()
        if comparable:
            self.compared += model.positions.sum(1).tolist()
            self.divergence += sums[2].tolist()
            self.agreeing += sums[3].tolist()

    def add_classes(self, model: Logits, baseline: Logits | None, labels: torch.Tensor) -> None:
        """Add the classes chosen for a batch of sequences with one label each, (rows,).

        Raises CalibrationError for labels outside the output classes.
        """
        classes = model.logits.shape[-1]
        if int(labels.min()) < 0 or int(labels.max()) >= classes:
            raise CalibrationError(
                f"the data has labels from {int(labels.min())} to {int(labels.max())}, but the model puts out "
                f"{classes} classes"
            )
        self.labels += labels.tolist()
        self.choices += finite(model.logits)[:, 0].argmax(-1).tolist()
        if baseline is not None:
            self.baseline_choices += finite(baseline.logits)[:, 0].argmax(-1).tolist()

    def add_scores(self, model: Logits, baseline: Logits | None) -> None:
        """Add a batch of a head for numbers, (rows, positions, 1). Raises CalibrationError for NaN or infinity."""
        self.compared += [1] * int(model.positions.sum())
        self.scores += finite(model.logits)[model.positions].flatten().double().tolist()
        if baseline is not None:
            self.baseline_scores += finite(baseline.logits)[baseline.positions].flatten().double().tolist()

    def extend(self, other: Totals) -> None:
        """Add another's sequences."""
        for name, values in vars(other).items():
            getattr(self, name).extend(values)

    def add_hidden(self, model: Hidden, baseline: Hidden) -> None:
        """Add a batch of hidden states, compared by their cosine in float32."""
        cosine = F.cosine_similarity(model.states.float(), baseline.states.to(model.states.device).float(), dim=-1)
        self.compared += model.positions.sum(1).tolist()
        self.cosine += cosine.double().masked_fill(~model.positions, 0.0).sum(1).tolist()


def is_score(found: Logits) -> bool:
    """Whether it is numbers, as a reranker's one for each sequence: their softmax is always 1."""
    return found.logits.shape[-1] == 1


def _log_probabilities(logits: torch.Tensor, scored: torch.Tensor | None) -> torch.Tensor:
    """Log-softmax in float32 (n, classes) of the scored positions of (rows, positions, classes); None: of all."""
    picked = logits.flatten(0, 1) if scored is None else logits[scored]
    return picked.float().log_softmax(-1)


def _nll(log_probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-log p of each label, 0 where there is none; float64 (n,)."""
    if len(labels) and int(labels.max()) >= log_probabilities.shape[-1]:
        raise CalibrationError(
            f"the data has token {int(labels.max())} but the model puts out {log_probabilities.shape[-1]} classes; "
            "the data was made with another tokenizer"
        )
    picked = log_probabilities.gather(-1, labels.clamp_min(0)[:, None])[:, 0].double()
    return torch.where(labels == IGNORED, 0.0, -picked)
