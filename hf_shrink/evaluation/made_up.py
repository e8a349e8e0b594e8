"""Made-up model inputs: time depends on their shape, not on what they say."""

from __future__ import annotations

from typing import Any

import torch

from hf_shrink.calibration.inputs import longest_text
from hf_shrink.errors import ArchitectureError

Inputs = dict[str, torch.Tensor]


def made_up_inputs(model: Any, length: int, batch: int = 1) -> Inputs:
    """Sequences, images or clips, the same every time, on the model's device.

    Args:
        model: a transformers model that reads token ids, images of a configured size, or mel spectra.
        length: tokens of a sequence, no more than the model has positions.
        batch: how many.

    Raises:
        ArchitectureError: the model reads something else.
    """
    config, device = model.config, model.device
    name = getattr(model, "main_input_name", "input_ids")
    generator = torch.Generator().manual_seed(0)
    if name == "pixel_values":
        return {name: _pixels(config, batch, generator).to(device, model.dtype)}
    if name == "input_features" and hasattr(config, "num_mel_bins"):
        frames = 2 * config.max_source_positions
        features = torch.randn(batch, config.num_mel_bins, frames, generator=generator)
        return {name: features.to(device, model.dtype)}
    text = config.get_text_config()
    if name != "input_ids" or not hasattr(text, "vocab_size"):
        raise ArchitectureError(f"{type(model).__name__} reads {name}: give an example of it as inputs=")
    limit = positions(model) or length
    ids = torch.randint(0, text.vocab_size, (batch, min(length, limit)), generator=generator).to(device)
    made = {name: ids, "attention_mask": torch.ones_like(ids)}
    if not generates(model) and config.is_encoder_decoder:
        made["decoder_input_ids"] = ids
    if not generates(model) and hasattr(config, "vision_config"):  # a model of two towers reads both
        made["pixel_values"] = _pixels(config, batch, generator).to(device, model.dtype)
    return made


def generates(model: Any) -> bool:
    """Whether the model has a `generate` that works."""
    return hasattr(model, "can_generate") and bool(model.can_generate())


def positions(model: Any) -> int | None:
    """How many tokens the model has positions for; None where that is not limited."""
    return longest_text(model) or longest_text(model, decoder=True)


def _pixels(config: Any, batch: int, generator: torch.Generator) -> torch.Tensor:
    """Images of the configured size, (batch, channels, height, width)."""
    vision = getattr(config, "vision_config", config)
    size = vision.image_size if isinstance(vision.image_size, list | tuple) else [vision.image_size] * 2
    return torch.randn(batch, getattr(vision, "num_channels", 3), *size, generator=generator)
