"""How well a model explains labels, as a loss that can be differentiated; the labels may be its own."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_shrink.calibration.targets import IGNORED, Batch, Hidden, Kind, targets_of
from hf_shrink.errors import CalibrationError

Labels = Literal["auto", "data", "model"]


def generator_of(seed: int, batch: int) -> torch.Generator:
    """What a batch's labels are drawn with: the same, whoever has which of the batches before it."""
    return torch.Generator().manual_seed((seed << 24) + batch)


def log_loss(kind: Kind, batch: Batch, outputs: Any, labels: Labels, generator: torch.Generator) -> Tensor:
    """Negative log-likelihood of a batch, summed over all that the model predicts; a float32 scalar.

    Args:
        kind: how the model is scored, see `kind_of`.
        batch: on the model's device, with labels where the data has some.
        labels: "data": the next tokens, or the batch's labels; "model": drawn from the model's own predictions, which
            makes the squared gradient an estimate of the Fisher information without any labels; "auto": those of the
            data where it has any, else the model's.
        generator: of what is drawn, on the CPU.

    A model that predicts nothing but states is taken for a Gaussian of unit variance around their directions, so that
    the expected squared gradient is the squared change of these directions; a head with one output for one around its
    score.

    Raises:
        CalibrationError: there is nothing to score in the outputs, or `labels` is "data" and there are none.
    """
    found = targets_of(kind, batch, outputs)
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
    wanted = found.labels
    if labels == "model" or (labels == "auto" and not bool((wanted != IGNORED).any())):
        wanted = _drawn(found.logits, found.positions, generator)
    scored = wanted != IGNORED
    return F.cross_entropy(found.logits[scored].float(), wanted[scored], reduction="sum")


def _drawn(logits: Tensor, positions: Tensor, generator: torch.Generator) -> Tensor:
    """One class for every position that counts, drawn from the model's distribution."""
    drawn = torch.full(logits.shape[:-1], IGNORED, dtype=torch.long, device=logits.device)
    cumulative = logits.detach()[positions].float().softmax(-1).cumsum(-1)
    uniform = torch.rand(len(cumulative), 1, generator=generator).to(cumulative.device) * (1 - 1e-6)
    drawn[positions] = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(-1)
    return drawn
