"""How well a model explains labels, as a loss that can be differentiated; the labels may be its own."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_shrink.calibration.targets import IGNORED, WORDS, Batch, Hidden, Kind, Logits, targets_of
from hf_shrink.errors import CalibrationError

Labels = Literal["auto", "data", "model"]


def generator_of(seed: int, batch: int) -> torch.Generator:
    """What a batch's labels are drawn with: the same, whoever has which of the batches before it."""
    return torch.Generator().manual_seed((seed << 24) + batch)


def log_loss(
    kind: Kind,
    batch: Batch,
    outputs: Any,
    labels: Labels,
    generator: torch.Generator,
    model: nn.Module | None = None,
) -> Tensor:
    """Negative log-likelihood of a batch, summed over all that the model predicts; a float32 scalar.

    Args:
        kind: how the model is scored, see `kind_of`.
        batch: on the model's device, with labels where the data has some.
        labels: "data": the next tokens, or the batch's labels; "model": drawn from the model's own predictions, which
            makes the squared gradient an estimate of the Fisher information without any labels; "auto": those of the
            data where it has any, else the model's.
        generator: of what is drawn, on the CPU.
        model: whose outputs they are, which says what padded sounds become, see `fitted`.

    A model that predicts nothing but states is taken for a Gaussian of unit variance around their directions, so that
    the expected squared gradient is the squared change of these directions; a head for numbers for one around each.

    Raises:
        CalibrationError: there is nothing to score in the outputs, or `labels` is "data" and there are none.
    """
    found = targets_of(kind, batch, outputs, model)
    if isinstance(found, Hidden):
        directions = F.normalize(found.states[found.positions].float(), dim=-1)
        noise = torch.randn(directions.shape, generator=generator).to(directions.device)
        return (directions * noise).sum()
    if found.logits.shape[-1] == 1:
        if labels == "data":
            raise CalibrationError(
                "the model puts out one number and no distribution, so the data's labels have no likelihood; leave "
                "`labels` at auto, which draws them around the model's own scores"
            )
        scores = found.logits[found.positions].float()
        return (scores * torch.randn(scores.shape, generator=generator).to(scores.device)).sum()
    wanted = None if labels == "model" else _given(kind, batch, found)
    if labels == "data" and wanted is None:
        raise CalibrationError(
            f"the batches ({', '.join(batch)}) have no labels of what the model predicts; give some of the shape "
            f"{tuple(found.positions.shape)}, or leave `labels` at auto, which draws them from the model's predictions"
        )
    if wanted is None or (labels == "auto" and not bool((wanted != IGNORED).any())):
        wanted = _drawn(found.logits, found.positions, generator)
    scored = wanted != IGNORED
    return F.cross_entropy(found.logits[scored].float(), wanted[scored], reduction="sum")


def _given(kind: Kind, batch: Batch, found: Logits) -> Tensor | None:
    """The data's label for every position, where it has some. Raises CalibrationError for one that is no class."""
    if kind in WORDS:
        known = kind == "causal" or "labels" in batch or bool((found.labels != IGNORED).any())
        return found.labels if known else None
    classes, labels = found.logits.shape[-1], batch.get("labels")
    if "start_positions" in batch and "end_positions" in batch:
        labels = torch.stack([batch["start_positions"], batch["end_positions"]], dim=1)
        labels = labels.masked_fill(labels >= classes, IGNORED)  # the answer is cut off
    if labels is not None and labels.dim() == 1:
        labels = labels[:, None]
    if labels is None or labels.shape != found.positions.shape or (labels.is_floating_point() and kind != "several"):
        return None
    wanted = (labels == 0).long() if kind == "several" else labels  # the first of its two choices is the class
    wanted = wanted.masked_fill(~found.positions, IGNORED)
    if int(wanted.max()) >= classes:
        raise CalibrationError(
            f"the data has labels up to {int(wanted.max())}, but the model puts out {classes} classes; rename the "
            "labels, or take the model that they belong to"
        )
    return wanted


def _drawn(logits: Tensor, positions: Tensor, generator: torch.Generator) -> Tensor:
    """One class for every position that counts, drawn from the model's distribution."""
    drawn = torch.full(logits.shape[:-1], IGNORED, dtype=torch.long, device=logits.device)
    cumulative = logits.detach()[positions].float().softmax(-1).cumsum(-1)
    uniform = torch.rand(len(cumulative), 1, generator=generator).to(cumulative.device) * (1 - 1e-6)
    drawn[positions] = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(-1)
    return drawn
