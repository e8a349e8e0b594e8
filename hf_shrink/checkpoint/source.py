"""Open the model to shrink: everything that can be wrong with it is found before anything is computed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    FEATURE_EXTRACTOR_MAPPING,
    IMAGE_PROCESSOR_MAPPING,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file

from hf_shrink.checkpoint.format import PRUNED_METHOD
from hf_shrink.checkpoint.shards import find_shards, read_json
from hf_shrink.errors import CheckpointError
from hf_shrink.residence import residence_of

AT_ONCE = 1 << 24  # elements that are looked at in one go
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)


@dataclass(frozen=True)
class Source:
    """A model that was found and looks whole.

    Attributes:
        name: the folder or Hub id as given.
        folder: where its files are; for a Hub id the local snapshot.
        config: config.json, decoded.
        shards: its safetensors files, in order; empty for a Hub id whose weights are not downloaded yet.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    shards: tuple[Path, ...]


def open_source(path_or_id: str | os.PathLike[str], *, dense: bool = True) -> Source:
    """Find a model and check its files without reading the weights. `dense`: a quantized one is refused.

    Raises:
        CheckpointError: no such folder or model, no config.json, weights missing, cut short, not safetensors, or
            quantized already.
    """
    name = os.fspath(path_or_id)
    local = Path(name).expanduser()
    is_folder = bool(name) and local.is_dir()
    folder = local if is_folder else _snapshot(name, local)
    config = read_json(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else None
    if config is None:
        raise CheckpointError(f"{name} has no {CONFIG_NAME}; give the folder of a model saved with save_pretrained")
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{name}/{CONFIG_NAME} names no model_type; hf_shrink needs a transformers model")
    if dense:
        _check_dense(name, config)
    return Source(name, folder, config, find_shards(name, folder) if is_folder else ())


def _snapshot(name: str, local: Path) -> Path:
    """The local snapshot of a Hub id. Raises CheckpointError."""
    if local.is_file():
        raise CheckpointError(f"{name} is a file; give the folder of a model saved with save_pretrained")
    if name.startswith((".", "~", os.sep)) or name.count("/") > 1 or not name:
        raise CheckpointError(f"there is no folder {name!r}; check the path")
    try:
        found = cached_file(name, CONFIG_NAME)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name!r} is neither a folder here nor a model that the Hub gives ({reason}); check the name or the "
            "connection"
        ) from error
    return Path(str(found)).parent


def _check_dense(name: str, config: dict[str, Any]) -> None:
    """Only a model that was pruned unevenly may carry a quantization_config."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        block = part.get("quantization_config")
        method = block.get("quant_method", "an unnamed method") if isinstance(block, dict) else None
        if method is not None and method != PRUNED_METHOD:
            raise CheckpointError(f"{name} is quantized already ({method}); give the dense model that it was made from")


def check_finite(model: nn.Module, where: str = "the model") -> None:
    """Raises CheckpointError naming the first floating-point tensor that holds NaN or Inf."""
    residence = residence_of(model)
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            continue
        if not all(bool(torch.isfinite(part).all()) for part in torch.split(tensor.detach().reshape(-1), AT_ONCE)):
            raise CheckpointError(f"{name} of {where} holds NaN or Inf; the model is damaged: get a sound copy of it")
        if residence is not None:
            residence.glanced_at(tensor)


def load_source_model(source: Source, dtype: torch.dtype | str = "auto", *, check: bool = True) -> PreTrainedModel:
    """The model in the class that it was saved from, in eval mode, every weight from the checkpoint and finite.

    Args:
        source: from `open_source`.
        dtype: of the weights; "auto" keeps what is stored.
        check: False: do not read the weights to see whether they are finite.

    Raises:
        CheckpointError: the class is not one of transformers', or the weights do not fit it.
    """
    model, info = from_checkpoint(source, dtype=dtype)
    if info["missing_keys"]:
        raise CheckpointError(
            f"{source.name} lacks {min(info['missing_keys'])} of its own class {type(model).__name__}, which would be "
            "random; download or save the model again"
        )
    if check:
        check_finite(model, source.name)
    return model


def from_checkpoint(source: Source, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model in eval mode as `from_pretrained` loads it with `options`, and what that says of its weights' names.

    Raises:
        CheckpointError: the class is not one of transformers', or does not load, or a weight is of another shape.
        torch.OutOfMemoryError: it does not fit its device.
    """
    kind = model_class(source)
    where = source.name if not source.shards else str(source.folder)
    options |= {"use_safetensors": True, "output_loading_info": True}
    try:
        # Weights of another shape are refused below: transformers only says so in a report that is hidden here.
        model, info = kind.from_pretrained(where, ignore_mismatched_sizes=True, **options)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())
        if "above report" in reason:  # of tensors that could not be joined: it is hidden here
            reason += f" transformers shows it for {kind.__name__}.from_pretrained({where!r})"
        raise CheckpointError(f"{source.name} does not load: {reason}") from error
    if misfits := sorted(info["mismatched_keys"]):
        name, stored, due = misfits[0]
        more = f", and {len(misfits) - 1} more do not fit" if len(misfits) > 1 else ""
        raise CheckpointError(
            f"{source.name} does not load: {name} is stored as {list(stored)}, and {list(due)} is what "
            f"{type(model).__name__} has by {CONFIG_NAME}{more}; download or save the model again"
        )
    return model.eval(), info


def model_class(source: Source) -> Any:
    """The class that the checkpoint was saved from; an auto class where it does not say.

    Raises CheckpointError for remote code, and for a class that is not one of transformers'.
    """
    model_type = source.config["model_type"]
    if model_type not in transformers.CONFIG_MAPPING:
        raise CheckpointError(
            f"{source.name} is a {model_type!r} model, which this transformers does not have; hf_shrink runs no code "
            "from checkpoints: load it yourself with trust_remote_code=True and call hf_shrink.shrink(model, ...)"
        )
    for architecture in source.config.get("architectures") or ():
        found = getattr(transformers, str(architecture), None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    if named := source.config.get("architectures"):
        raise CheckpointError(
            f"{source.name} was saved from {named[0]}, which is no class of this transformers, so weights of its own "
            "would be lost; load it yourself and call hf_shrink.shrink(model, ...)"
        )
    return AutoModelForCausalLM if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModel


def load_processing(source: Source) -> Any:
    """The model's processor, else its tokenizer; None when it has neither. Raises CheckpointError when it is broken.

    Without a tokenizer's files, what reads its images or sounds stands for the processor, which would want one.
    """
    has_processor, has_tokenizer = (
        any(side_file(source, name) is not None for name in names) for names in (PROCESSOR_FILES, TOKENIZER_FILES)
    )
    if not has_processor and not has_tokenizer:
        return None
    loader: Any = AutoProcessor if has_processor else AutoTokenizer
    if not has_tokenizer and (model_type := source.config["model_type"]) in CONFIG_MAPPING:
        if CONFIG_MAPPING[model_type] in FEATURE_EXTRACTOR_MAPPING:
            loader = AutoFeatureExtractor
        elif CONFIG_MAPPING[model_type] in IMAGE_PROCESSOR_MAPPING:
            loader = AutoImageProcessor
    try:
        return loader.from_pretrained(source.name if not source.shards else str(source.folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the tokenizer or processor of {source.name} does not load: {' '.join(str(error).split())}"
        ) from error


def side_file(source: Source, name: str) -> Path | None:
    """A file that lies beside the weights, fetched from the Hub for an id; None when the model has none such."""
    if source.shards:
        return source.folder / name if (source.folder / name).is_file() else None
    found = cached_file(
        source.name,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(str(found)) if found is not None else None
