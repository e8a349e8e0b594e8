"""Tiny models with random weights, something for them to read, and whether two of them say the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils.generic import ModelOutput

from hf_shrink.architectures.linears import is_matrix
from hf_shrink.architectures.reads import accepted_names
from hf_shrink.architectures.tiny import VOCABULARY, rebuilt, shrunken

Inputs = dict[str, Tensor]
TOLERANCE = 1e-4  # of the largest output; float32 sums in another order stay far below
VISIBLE = 1e-3  # what differs by less than this cannot be told from rounding


class ProbeError(Exception):
    """A tiny model could not be built or run; says why."""


def build(kind: type[PreTrainedModel], config: PretrainedConfig, *, meta: bool = False) -> PreTrainedModel:
    """A model of the config in eval mode, float32, with random weights that make every part matter; or on meta.

    Raises ProbeError: the class does not take this config.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta" if meta else "cpu"), no_init_weights():
        torch.manual_seed(0)
        try:
            model = kind(config)
        except Exception as error:  # whatever a class does with a config that does not suit it
            raise ProbeError(f"it cannot be built from a small config ({_short(error)})") from error
        model.tie_weights()
    if not meta:
        _fill(model)
    ready: PreTrainedModel = model.float().eval()
    return ready


def _fill(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
        if parameter.dim() > 2 and "conv" not in name:  # matrices in a stack
            fan_in = parameter.shape[-1]
        with torch.no_grad():
            if parameter.dim() < 2 and name.endswith("weight"):
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
            else:
                spread = 1.3 * fan_in**-0.5 if parameter.dim() > 1 else 0.2
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))


@contextmanager
def plain_tensors() -> Iterator[None]:
    """float32 on the CPU, and no gradients, whatever is being loaded around this."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(before)


def input_dimensions(model: PreTrainedModel) -> dict[str, int]:
    """How many dimensions the input of each matrix has, by path, in a narrow copy of the model.

    Matrices that the copy does not run (of an image tower, where it reads text) are absent. Raises ProbeError: there is
    no copy that runs.
    """
    found: dict[str, int] = {}

    def note(path: str, given: Any) -> None:
        found[path] = given[0].dim()

    with plain_tensors():
        try:
            config = rebuilt(shrunken(model.config))
        except Exception as error:  # whatever a class does with a config that does not suit it
            raise ProbeError(f"its config cannot be made small ({_short(error)})") from error
        small = build(type(model), config)
        inputs = find_inputs(small)
        for path, module in small.named_modules():
            if is_matrix(module):
                module.register_forward_pre_hook(lambda _, given, path=path: note(path, given))
        outputs(small, inputs)
    return found


def find_inputs(model: PreTrainedModel) -> Inputs:
    """Inputs on which the model runs. Raises ProbeError with the last reason when there are none."""
    reason = "nothing that it reads is known"
    for inputs in _candidates(model):
        try:
            first, second = outputs(model, inputs), outputs(model, inputs)
        except ProbeError as error:
            reason = str(error)
            continue
        if not first or not all(bool(torch.isfinite(t).all()) for t in first):
            reason = "it gives no finite outputs"
        elif difference(first, second) > TOLERANCE:
            reason = "it gives other outputs each time"
        else:
            return inputs
    raise ProbeError(reason)


def outputs(model: PreTrainedModel, inputs: Inputs) -> list[Tensor]:
    """Every floating-point tensor that the model returns, without its KV cache. Raises ProbeError where it fails."""
    accepted = accepted_names(model) or ()
    options = {"use_cache": False} if "use_cache" in accepted else {}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found = model(**inputs, **options)
    except Exception as error:  # whatever a forward raises on inputs or weights that do not suit it
        raise ProbeError(f"its forward fails ({_short(error)})") from error
    return list(_tensors(found))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, ModelOutput):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)


def difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative difference of any output; infinite where they are not alike at all."""
    if [t.shape for t in actual] != [t.shape for t in expected]:
        return float("inf")
    worst = 0.0
    for a, b in zip(actual, expected, strict=True):
        if not a.numel():
            continue
        found = float((a - b).abs().max() / b.abs().max().clamp_min(1e-6))
        worst = max(worst, found if found == found else float("inf"))
    return worst


def _candidates(model: PreTrainedModel) -> Iterator[Inputs]:
    """What the model may read, the likelier first."""
    accepted = accepted_names(model) or frozenset()
    main = model.main_input_name
    config = model.config
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(5, VOCABULARY // 2 - 4, (2, 12), generator=generator)
    extra: Inputs = {}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        extra["decoder_input_ids"] = torch.randint(5, VOCABULARY // 2 - 4, (2, 9), generator=generator)
    if "bbox" in accepted:
        low, size = torch.randint(0, 8, (2, 12, 2), generator=generator), torch.ones(2, 12, 2, dtype=torch.long)
        extra["bbox"] = torch.cat([low, low + size], -1)
    if main == "input_ids" and "pixel_values" in accepted and not model.can_generate():
        for pictures in _pictures(config, generator):  # two towers
            yield {"input_ids": text, "pixel_values": pictures, **extra}
    if "input_ids" in accepted:
        yield {"input_ids": text, **extra}
        yield {"input_ids": text, "attention_mask": torch.ones_like(text), **extra}
    if "pixel_values" in accepted:
        for pictures in _pictures(config, generator):
            yield {"pixel_values": pictures, **extra}
    for name in ("input_features", "input_values"):
        if name in accepted:
            for sound in _sounds(config, name, generator):
                yield {name: sound, **extra}


def _pictures(config: Any, generator: torch.Generator) -> Iterator[Tensor]:
    size = _setting(config, "image_size")
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:] if size else (64, 64)
    channels = _setting(config, "num_channels") or _setting(config, "in_channels") or 3
    frames = _setting(config, "num_frames")
    if isinstance(frames, int):
        yield torch.randn(2, frames, channels, height, width, generator=generator)
    yield torch.randn(2, channels, height, width, generator=generator)
    if height != 64:
        yield torch.randn(2, channels, 64, 64, generator=generator)


def _sounds(config: Any, name: str, generator: torch.Generator) -> Iterator[Tensor]:
    bins = _setting(config, "num_mel_bins") or _setting(config, "feature_size") or _setting(config, "input_dim")
    width = _setting(config, "feature_projection_input_dim")
    positions = _setting(config, "max_source_positions")
    frames = _setting(config, "max_length")
    if name == "input_features" or bins is not None:
        for b in (b for b in (bins, width) if isinstance(b, int)):
            if isinstance(positions, int):
                yield torch.randn(2, b, 2 * positions, generator=generator)
            if isinstance(frames, int):
                yield torch.randn(2, frames, b, generator=generator)
            yield torch.randn(2, 64, b, generator=generator)
            yield torch.randn(2, b, 64, generator=generator)
    yield torch.randn(2, 4000, generator=generator)
    yield torch.randn(2, 1, 4000, generator=generator)


def _setting(config: Any, name: str) -> Any:
    """The value of a key in a config or in the first part of it that has it."""
    own = getattr(config, name, None)
    inner = (getattr(config, part, None) for part in getattr(config, "sub_configs", ()))
    return own if own is not None else next((v for p in inner if p is not None and (v := _setting(p, name))), None)


def _short(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__
