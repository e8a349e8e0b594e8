"""One vector for each text, from a model's last hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_shrink.architectures.reads import accepted_names
from hf_shrink.errors import CalibrationError
from hf_shrink.evaluation.scored import finite
from hf_shrink.evaluation.tasks.base import Progressing, Subject

Pooling = Literal["mean", "first", "last"]
POOLINGS = ("mean", "first", "last")


def check_pooling(pooling: str) -> None:
    """Raises ValueError for one that does not exist."""
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is {', '.join(POOLINGS)}, not {pooling!r}")


def embeds_texts(model: nn.Module) -> bool:
    """Whether the model reads texts and has no head: what embeddings are taken from."""
    if getattr(model, "main_input_name", "") != "input_ids" or getattr(model, "base_model", None) is not model:
        return False
    if "pixel_values" in (accepted_names(model) or ()):  # one of two towers, which reads images beside texts
        return False
    return getattr(model, "get_output_embeddings", lambda: None)() is None


def embeddings(subject: Subject, texts: Sequence[str], pooling: Pooling, run: Progressing) -> Tensor:
    """Vectors of length 1, float32 (texts, width), on the CPU.

    Args:
        pooling: over a text's tokens: their mean, the first's state or the last's.

    Raises:
        CalibrationError: the model has no hidden states of the text.
    """
    model = getattr(subject.model, "base_model", subject.model)
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    found = []
    for batch in run.batches(texts, subject.alone):
        inputs = subject.padded(batch)
        states = getattr(model(**inputs), "last_hidden_state", None)
        if states is None:
            raise CalibrationError(f"{type(subject.model).__name__} puts out no hidden states to make vectors of")
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        found.append(F.normalize(_pooled(states.float(), mask, pooling), dim=-1).cpu())
    return finite(torch.cat(found))


def _pooled(states: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """(rows, width) from (rows, tokens, width); padding on either side does not count."""
    rows, real = torch.arange(len(states), device=states.device), mask.bool()
    if pooling == "mean":
        return (states * real[..., None]).sum(1) / real.sum(1, keepdim=True)
    places = torch.arange(mask.shape[1], device=mask.device)
    if pooling == "first":
        return states[rows, places.masked_fill(~real, mask.shape[1]).argmin(1)]
    return states[rows, places.masked_fill(~real, -1).argmax(1)]


def cosines(own: Sequence[Tensor], dense: Sequence[Tensor]) -> list[float] | None:
    """Cosine of each pair of vectors; None where the models' widths differ."""
    if own[0].shape != dense[0].shape:
        return None
    return F.cosine_similarity(torch.stack([*own]), torch.stack([*dense])).double().tolist()
