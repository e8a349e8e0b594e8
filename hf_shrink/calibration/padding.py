"""Leave padding out of what is counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of a matrix's input that are not padding; some blocks merge batch and sequence before their MLP.

    Args:
        x: (batch, sequence, ...), (batch * sequence, width) or of another shape, which is left as it is.
        mask: bool (batch, sequence) of the real tokens; None when nothing is padded.
    """
    if mask is not None and x.dim() > 2 and x.shape[:2] == mask.shape:
        return x[mask.to(x.device)]
    if mask is not None and x.dim() == 2 and x.shape[0] == mask.numel():
        return x[mask.reshape(-1).to(x.device)]
    return x


def token_mask(batch: Mapping[str, Any], leading: torch.Size, model: nn.Module | None = None) -> Tensor | None:
    """bool (batch, sequence) of the real tokens where the batch says so for this shape; None: all are.

    Those of the decoder where the batch has something for one. `model`: what made states of that shape, see `fitted`.
    """
    decoder = any(name.startswith("decoder_") for name in batch)
    mask = batch.get("decoder_attention_mask" if decoder else "attention_mask")
    return fitted(mask, leading, model) if isinstance(mask, Tensor) else None


def fitted(mask: Tensor, leading: torch.Size, model: nn.Module | None) -> Tensor | None:
    """The mask of a model's input for states of the shape `leading`, bool (batch, sequence).

    Models of sound make fewer frames of what they read. Those that bring a mask of samples to their frames themselves
    are asked to. None: the mask is about something else, or the model does not say what becomes of it.
    """
    if mask.shape == leading:
        return mask.bool()
    if model is None or mask.dim() != 2 or mask.shape[:1] != leading[:1]:
        return None
    sound: Any = next((part for part in model.modules() if hasattr(part, "_get_feature_vector_attention_mask")), None)
    if sound is None:
        return None
    adapts = getattr(sound.config, "add_adapter", False)  # frames are joined once more, behind the blocks
    for options in ({}, {"add_adapter": False}) if adapts else ({},):
        frames = sound._get_feat_extract_output_lengths(torch.tensor(mask.shape[1]), **options)
        if int(frames) == leading[1]:
            found: Tensor = sound._get_feature_vector_attention_mask(leading[1], mask.long(), **options)
            return found.bool()
    return None
