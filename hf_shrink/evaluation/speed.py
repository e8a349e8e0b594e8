"""How fast a model decodes, or runs forward, here and now."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

from hf_shrink.errors import ArchitectureError
from hf_shrink.evaluation.greedy import greedy_config

Inputs = Mapping[str, torch.Tensor]


def decode_speed(
    model: Any, *, prompt: int = 64, new: int = 64, repeats: int = 3, inputs: Inputs | None = None
) -> float:
    """Tokens per second of greedy decoding at batch 1, the median of `repeats` after a warm-up.

    The time of a run includes reading the prompt. Exactly `new` tokens are made, an early end of text is suppressed.

    Args:
        model: a model that generates.
        prompt, new: tokens; both shrink to fit the positions that the model has.
        repeats: timed runs.
        inputs: instead of a made-up prompt, for models that do not read token ids.

    Raises:
        ArchitectureError: the model does not generate; see `forward_latency`.
    """
    run, made = _decoding(model, prompt, new, inputs)
    _seconds(run)
    return made / statistics.median(_seconds(run) for _ in range(repeats))


def forward_latency(model: Any, *, length: int = 64, repeats: int = 5, inputs: Inputs | None = None) -> float:
    """Seconds of one forward pass at batch 1, the median of `repeats` after a warm-up; for models without `generate`.

    Args:
        model: any transformers model.
        length: tokens of the made-up input; images take the configured size.
        repeats: timed runs.
        inputs: instead of a made-up input.
    """
    run = _forward(model, length, inputs)
    _seconds(run)
    return statistics.median(_seconds(run) for _ in range(repeats))


def compare_decode_speed(
    dense: Any, small: Any, *, prompt: int = 64, new: int = 64, repeats: int = 3, inputs: Inputs | None = None
) -> dict[str, Any]:
    """Both models' speed, their runs alternating so that a busy machine slows both alike.

    Returns:
        {"unit", "dense", "compressed", "speedup"}: medians in "tokens/s" for models that generate, else "passes/s" of
        one forward pass; speedup is compressed / dense.
    """
    generates = hasattr(dense, "can_generate") and dense.can_generate()
    runs, made = [], 1
    for model in (dense, small):
        if generates:
            run, made = _decoding(model, prompt, new, inputs)
        else:
            run = _forward(model, prompt, inputs)
        _seconds(run)
        runs.append(run)
    times = [[_seconds(run) for run in runs] for _ in range(repeats)]
    slow, fast = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "unit": "tokens/s" if generates else "passes/s",
        "dense": made / slow,
        "compressed": made / fast,
        "speedup": slow / fast,
    }


def _decoding(model: Any, prompt: int, new: int, inputs: Inputs | None) -> tuple[Any, int]:
    if not (hasattr(model, "can_generate") and model.can_generate()):
        raise ArchitectureError(f"{type(model).__name__} does not generate; use forward_latency instead")
    text = model.config.get_text_config(decoder=True)
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "max_target_positions", None)
    if limit is not None and prompt + new > limit:
        prompt = min(prompt, limit // 2)
        new = min(new, limit - prompt)
    made = dict(inputs) if inputs is not None else _inputs(model, prompt)
    config = greedy_config(model, new, exactly=True)

    def run() -> None:
        model.generate(**made, generation_config=config)

    return run, new


def _forward(model: Any, length: int, inputs: Inputs | None) -> Any:
    made = dict(inputs) if inputs is not None else _inputs(model, length)

    def run() -> None:
        model(**made)

    return run


def _inputs(model: Any, length: int) -> dict[str, torch.Tensor]:
    """Made-up inputs of one sequence, image or clip: time depends on their shape, not on what they say."""
    config, device = model.config, model.device
    name = getattr(model, "main_input_name", "input_ids")
    generator = torch.Generator().manual_seed(0)
    if name == "pixel_values":
        return {name: _pixels(config, generator).to(device, model.dtype)}
    if name == "input_features" and hasattr(config, "num_mel_bins"):
        frames = 2 * config.max_source_positions
        features = torch.randn(1, config.num_mel_bins, frames, generator=generator)
        return {name: features.to(device, model.dtype)}
    text = config.get_text_config()
    if name != "input_ids" or not hasattr(text, "vocab_size"):
        raise ArchitectureError(f"{type(model).__name__} reads {name}: give an example of it as inputs=")
    limit = getattr(text, "max_position_embeddings", None) or length
    ids = torch.randint(0, text.vocab_size, (1, min(length, limit)), generator=generator).to(device)
    made = {name: ids, "attention_mask": torch.ones_like(ids)}
    if not model.can_generate() and config.is_encoder_decoder:
        made["decoder_input_ids"] = ids
    if not model.can_generate() and hasattr(config, "vision_config"):  # a model of two towers reads both
        made["pixel_values"] = _pixels(config, generator).to(device, model.dtype)
    return made


def _pixels(config: Any, generator: torch.Generator) -> torch.Tensor:
    """One image of the configured size, (1, channels, height, width)."""
    vision = getattr(config, "vision_config", config)
    size = vision.image_size if isinstance(vision.image_size, list | tuple) else [vision.image_size] * 2
    return torch.randn(1, getattr(vision, "num_channels", 3), *size, generator=generator)


@torch.no_grad()
def _seconds(run: Any) -> float:
    _wait()
    start = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    """Accelerators work behind the caller's back; the clock must not stop before they do."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
