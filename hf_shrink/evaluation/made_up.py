"""Made-up model inputs: time depends on their shape, not on what they say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hf_shrink.architectures.reads import accepted_names
from hf_shrink.calibration.inputs import inputs_of, longest_text
from hf_shrink.calibration.media import media_noise
from hf_shrink.errors import ArchitectureError, CalibrationError, ShrinkError

Inputs = dict[str, torch.Tensor]
EXAMPLE = "`measure_speed` takes an example of what it reads as inputs="


def made_up_inputs(model: Any, length: int, batch: int = 1, *, to_generate: bool = False) -> Inputs:
    """Sequences, images, videos or sounds, the same every time, on the model's device.

    Args:
        model: a transformers model that reads token ids, or images, videos or sounds of a shape that its config says.
        length: tokens of a sequence, no more than the model has positions.
        batch: how many.
        to_generate: for `generate`, where a decoder begins by itself; else for a forward pass.

    Raises:
        ArchitectureError: the model reads something else.
    """
    config = model.config
    name = getattr(model, "main_input_name", "input_ids")
    if name == "input_ids":
        ids = _ids(model, length, batch)
        made = {name: ids, "attention_mask": torch.ones_like(ids)}
        if not generates(model) and hasattr(config, "vision_config"):  # a model of two towers reads both
            made |= _media(model, "pixel_values", batch)
    else:
        made = _media(model, name, batch)
    if config.is_encoder_decoder and not to_generate and "decoder_input_ids" in (accepted_names(model) or ()):
        made["decoder_input_ids"] = _ids(model, length, batch)
    return made


@contextmanager
def reading_made_up(model: Any) -> Iterator[None]:
    """Around a model's first run on made-up inputs.

    Raises:
        ArchitectureError: in place of whatever a model raises on inputs that do not suit it.
    """
    try:
        yield
    except (ShrinkError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ArchitectureError(f"{type(model).__name__} does not run on made-up inputs ({said}); {EXAMPLE}") from error


def generates(model: Any) -> bool:
    """Whether the model has a `generate` that works."""
    return hasattr(model, "can_generate") and bool(model.can_generate())


def positions(model: Any) -> int | None:
    """How many tokens the model has positions for; None where that is not limited."""
    return longest_text(model) or longest_text(model, decoder=True)


def _ids(model: Any, length: int, batch: int) -> torch.Tensor:
    """Token ids, (batch, tokens)."""
    config = model.config
    size = getattr(config.get_text_config(), "vocab_size", None)
    if size is None:
        raise ArchitectureError(f"the config of {type(model).__name__} has no vocab_size; {EXAMPLE}")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, size, (batch, min(length, positions(model) or length)), generator=generator)
    end = getattr(config, "eos_token_id", None)
    if config.is_encoder_decoder and not generates(model) and isinstance(end, int):
        ids[ids == end] = (end + 1) % size
        ids[:, -1] = end  # heads for classes read the state of a text's only end
    return ids.to(model.device)


def _media(model: Any, name: str, batch: int) -> Inputs:
    """Images, videos or sounds."""
    try:
        noise = media_noise(model, inputs_of(model), None, batch, seed=0)
    except CalibrationError as error:
        raise ArchitectureError(
            f"{type(model).__name__} reads {name}, and its config does not say of what shape; {EXAMPLE}"
        ) from error
    return {name: noise.to(model.device, model.dtype)}
