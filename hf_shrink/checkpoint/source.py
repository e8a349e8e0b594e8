"""Open the model to shrink: everything that can be wrong with it is found before anything is computed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from hf_shrink.checkpoint.format import PRUNED_METHOD
from hf_shrink.errors import CheckpointError

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
_MAX_HEADER = 100_000_000  # bytes; safetensors' own limit


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
    folder = local if local.is_dir() else _snapshot(name, local)
    config = read_json(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else None
    if config is None:
        raise CheckpointError(f"{name} has no {CONFIG_NAME}; give the folder of a model saved with save_pretrained")
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{name}/{CONFIG_NAME} names no model_type; hf_shrink needs a transformers model")
    if dense:
        _check_dense(name, config)
    return Source(name, folder, config, _shards(name, folder) if local.is_dir() else ())


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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download or save the model again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object; download or save the model again")
    return data


def _check_dense(name: str, config: dict[str, Any]) -> None:
    """Only a model that was pruned unevenly may carry a quantization_config."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        block = part.get("quantization_config")
        method = block.get("quant_method", "an unnamed method") if isinstance(block, dict) else None
        if method is not None and method != PRUNED_METHOD:
            raise CheckpointError(
                f"{name} is quantized already ({method}); give the dense model that it was made from"
            )


def _shards(name: str, folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a folder, each checked against its own header and the index."""
    single, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if single.is_file():
        read_header(single)
        return (single,)
    if not index.is_file():
        if (folder / WEIGHTS_NAME).is_file() or (folder / WEIGHTS_INDEX_NAME).is_file():
            raise CheckpointError(
                f"{name} holds pickled weights ({WEIGHTS_NAME}), which can run code when read; save it as safetensors "
                "first: from_pretrained and save_pretrained of transformers do that"
            )
        raise CheckpointError(f"{name} has a config but no weights ({SAFE_WEIGHTS_NAME}); download it again")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; download the model again")
    shards = sorted({str(shard) for shard in weight_map.values()})
    for shard in shards:
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} names {shard!r}, which is outside the folder; download the model again")
        if not (folder / shard).is_file():
            raise CheckpointError(f"{name} lacks the shard {shard} that its index names; download it again")
        absent = {tensor for tensor, where in weight_map.items() if where == shard} - read_header(folder / shard).keys()
        if absent:
            raise CheckpointError(f"{folder / shard} lacks {min(absent)}, which the index places there; download again")
    return tuple(folder / shard for shard in shards)


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of a safetensors file by tensor name: dtype, shape, data_offsets.

    Raises:
        CheckpointError: the file is cut short, too long, or not safetensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise CheckpointError(f"{path} is cut short or not a safetensors file ({size} bytes); download it again")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{path} has a broken safetensors header ({error}); download it again") from error
    if 8 + length + end != size:
        raise CheckpointError(
            f"{path} should have {8 + length + end} bytes by its header but has {size}; download it again"
        )
    return dict(header)


def check_finite(tensors: Iterable[tuple[str, Tensor]], where: str = "the model") -> None:
    """Raises CheckpointError naming the first floating-point tensor that holds NaN or Inf."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{name} of {where} holds NaN or Inf; the model is damaged: get a sound copy of it")


def load_source_model(source: Source, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The model in the class that it was saved from, in eval mode, every weight from the checkpoint and finite.

    Args:
        source: from `open_source`.
        dtype: of the weights; "auto" keeps what is stored.

    Raises:
        CheckpointError: the class is not one of transformers', or the weights do not fit it.
    """
    where = source.name if not source.shards else str(source.folder)
    try:
        model, info = model_class(source).from_pretrained(
            where, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{source.name} does not load: {' '.join(str(error).split())}") from error
    if info["missing_keys"]:
        raise CheckpointError(
            f"{source.name} lacks {min(info['missing_keys'])} of its own class {type(model).__name__}, which would be "
            "random; download or save the model again"
        )
    check_finite(model.state_dict().items(), source.name)
    loaded: PreTrainedModel = model.eval()
    return loaded


def model_class(source: Source) -> Any:
    """The class that the checkpoint was saved from, else an auto class. Raises CheckpointError for remote code."""
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
    return AutoModelForCausalLM if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModel


def load_processing(source: Source) -> Any:
    """The model's processor, else its tokenizer; None when it has neither. Raises CheckpointError when it is broken."""
    loaders = ((AutoProcessor, PROCESSOR_FILES), (AutoTokenizer, TOKENIZER_FILES))
    for loader, names in loaders:
        if any(side_file(source, name) is not None for name in names):
            where = source.name if not source.shards else str(source.folder)
            try:
                return loader.from_pretrained(where)
            except (OSError, ValueError, KeyError) as error:
                raise CheckpointError(
                    f"the tokenizer or processor of {source.name} does not load: {' '.join(str(error).split())}"
                ) from error
    return None


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
