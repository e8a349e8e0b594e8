"""What a model predicts, and how far another's predictions are from that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_shrink.calibration.padding import token_mask
from hf_shrink.calibration.targets import Kind, choices
from hf_shrink.errors import ArchitectureError, CalibrationError

CHUNK = 2**22  # logits handled at once, in elements


@dataclass(frozen=True)
class Predictions:
    """Rows of one forward pass that count.

    Attributes:
        values: (rows, classes) logits, (rows, width) hidden states or embeddings, or (rows, 1) numbers.
        distribution: whether they are logits.
    """

    values: Tensor
    distribution: bool

    def thinned(self, most: int) -> Predictions:
        """At most `most` rows, evenly spread."""
        rows = len(self.values)
        if rows <= most:
            return self
        index = torch.linspace(0, rows - 1, most).long().to(self.values.device)
        return Predictions(self.values[index], self.distribution)


def predictions_of(
    outputs: Mapping[str, Any], batch: Mapping[str, Any], kind: Kind = "other", model: nn.Module | None = None
) -> Predictions:
    """The predictions of a model's output, without padding.

    Logits of a token, class or span head; else the last hidden states or the embeddings. Of several classes each is a
    row, a choice between it and its absence, and of numbers each.

    Args:
        kind: how the model is scored, see `kind_of`.
        model: whose outputs they are, which says what padded sounds become, see `fitted`.

    Raises:
        ArchitectureError: there is nothing of the kind in the output.
    """
    logits = outputs.get("logits")
    if logits is not None and kind in ("several", "numbers"):
        rows = real_rows(logits if logits.dim() >= 2 else logits[:, None], batch, model)
        several = kind == "several"
        return Predictions(choices(rows).flatten(0, 1) if several else rows.reshape(-1, 1), several)
    if logits is not None and logits.dim() >= 2 and logits.shape[-1] > 1:
        return Predictions(real_rows(logits, batch, model), True)
    if outputs.get("start_logits") is not None:
        return Predictions(torch.cat([outputs["start_logits"], outputs["end_logits"]]), True)
    if logits is not None:  # a score
        return Predictions(real_rows(logits if logits.dim() >= 2 else logits[:, None], batch, model), False)
    if outputs.get("last_hidden_state") is not None:
        return Predictions(real_rows(outputs["last_hidden_state"], batch, model), False)
    embeddings = [outputs[key] for key in ("image_embeds", "text_embeds") if outputs.get(key) is not None]
    if embeddings:
        return Predictions(torch.cat(embeddings), False)
    raise ArchitectureError(
        f"the model's output ({', '.join(outputs)}) has no logits, hidden states or embeddings to compare; "
        "use method: block_influence, which compares inside the model"
    )


def real_rows(values: Tensor, batch: Mapping[str, Any], model: nn.Module | None = None) -> Tensor:
    """(rows, width) of (..., width), without padding where the batch, or the model with it, says what that is."""
    mask = token_mask(batch, values.shape[:2], model) if values.dim() == 3 else None
    return values[mask.to(values.device)] if mask is not None else values.flatten(0, -2)


def keep(dense: Predictions) -> Predictions:
    """The dense model's predictions in the form that `divergence` wants: float32, logits as log-probabilities."""
    values = dense.values.float()
    return Predictions(values.log_softmax(-1) if dense.distribution else values.clone(), dense.distribution)


def divergence(dense: Predictions, pruned: Predictions) -> float:
    """Sum over rows, in float64, of KL(dense || pruned) in nats, of 1 - cos, or of half the squared error of scores.

    Half the squared error is the divergence of two Gaussians of unit variance: the angle of two numbers says nothing.

    Args:
        dense: from `keep`.

    Raises:
        CalibrationError: NaN or Inf in either.
    """
    total = 0.0
    step = max(1, CHUNK // dense.values.shape[1])
    for start in range(0, len(dense.values), step):
        reference, other = dense.values[start : start + step], pruned.values[start : start + step].float()
        if dense.distribution:
            found = F.kl_div(other.log_softmax(-1), reference, reduction="none", log_target=True).sum(-1)
        elif reference.shape[-1] == 1:
            found = (other - reference).square().sum(-1) / 2
        else:
            found = 1 - F.cosine_similarity(other, reference, dim=-1)
        total += float(found.double().sum())
    if not total < float("inf"):
        raise CalibrationError("NaN or Inf in the model's predictions; check the weights and the calibration data")
    return total
