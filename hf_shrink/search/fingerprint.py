"""Sensitivities on disk, found again by what they were measured of: model, data, method, and what was asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_shrink.architectures.binding import Binding
from hf_shrink.checkpoint.record import hf_shrink_version
from hf_shrink.progress import ProgressCallback, quiet
from hf_shrink.quantization.base import QuantizationMethod
from hf_shrink.search.measuring import Space, measure
from hf_shrink.search.sensitivity import Sensitivity
from hf_shrink.sharding import ranks

SAMPLED = 4096  # elements of each weight that are looked at
ORIGIN = ("_name_or_path", "transformers_version", "architectures")  # in a configuration


def sensitivity_of(
    model: nn.Module,
    binding: Binding,
    space: Space,
    method: QuantizationMethod | None,
    quantizable: Collection[str],
    batches: Sequence[Mapping[str, Any]],
    folder: Path | None,
    *,
    seed: int = 0,
    scale_dtype: torch.dtype = torch.float32,
    progress: ProgressCallback = quiet,
) -> Sensitivity:
    """As `measure`; taken from `folder` where it was measured before, and else kept there. None: neither."""
    settings = {
        "space": asdict(space),
        "method": type(method).__name__,
        "options": asdict(method) if method is not None else {},  # type: ignore[call-overload]
        "quantizable": sorted(quantizable),
        "seed": seed,
        "scale_dtype": str(scale_dtype),
    }
    path, own = None, ""
    if folder is not None:
        own = ranks().on_first(lambda: fingerprint(model, batches, settings))
        path = folder / f"{own[:32]}.safetensors"
        if (known := ranks().on_first(lambda: Sensitivity.load(path, own))) is not None:
            return known
    found = measure(
        model,
        binding,
        space,
        method,
        quantizable,
        batches,
        seed=seed,
        scale_dtype=scale_dtype,
        progress=progress,
    )
    found = ranks().from_first(found)
    if path is not None:
        ranks().on_first(lambda: found.save(path, own))
    return found


def fingerprint(model: nn.Module, batches: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """A hexadecimal digest of this version, the model and the data.

    Of each weight shape, dtype and SAMPLED elements count, of the configuration and the data everything, with shapes.
    """
    own = {"class": type(model).__qualname__, "config": _config(model), "hf_shrink": hf_shrink_version()}
    digest = hashlib.sha256(json.dumps({**settings, **own}, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_bytes(_sampled(tensor.detach().reshape(-1))))
    for batch in batches:
        digest.update(f"batch of {len(batch)}".encode())
        for name, value in sorted(batch.items()):
            if isinstance(value, Tensor):
                digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
                digest.update(_bytes(value))
            else:
                digest.update(f"{name} {value}".encode())
    return digest.hexdigest()


def _config(model: nn.Module) -> dict[str, Any]:
    """What a configuration says, but for where the model came from and who wrote it."""
    config = getattr(model, "config", None)
    return {} if config is None else _without_origin(config.to_dict())


def _without_origin(found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        str(name): _without_origin(value) if isinstance(value, Mapping) else value
        for name, value in found.items()
        if name not in ORIGIN
    }


def _sampled(flat: Tensor) -> Tensor:
    """Elements that lie everywhere, in all columns of a matrix; the same ones each time."""
    if flat.numel() <= SAMPLED:
        return flat
    places = torch.randint(flat.numel(), (SAMPLED,), generator=torch.Generator().manual_seed(0))
    return flat[places.to(flat.device)]


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
