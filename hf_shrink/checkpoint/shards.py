"""The safetensors files of a model, checked by their headers: nothing of the weights is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from hf_shrink.errors import CheckpointError

_MAX_HEADER = 100_000_000  # bytes; safetensors' own limit


def find_shards(name: str, folder: Path) -> tuple[Path, ...]:
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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download or save the model again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object; download or save the model again")
    return data


@contextmanager
def one_layout(folder: Path, variant: str | None, is_main_process: bool = True) -> Iterator[None]:
    """Saves weights, and leaves no older ones beside them: of the file for all and the index of shards, the one that
    was not written is removed. Files of other variants stay; shards that an index named go with transformers."""
    names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    paths = [folder / (name if variant is None else f".{variant}.".join(name.rsplit(".", 1))) for name in names]
    before = [_version(path) for path in paths]
    yield
    if not is_main_process:
        return
    written = [_version(path) != old for path, old in zip(paths, before, strict=True)]
    if any(written):
        for path, new in zip(paths, written, strict=True):
            if not new:
                path.unlink(missing_ok=True)


def _version(path: Path) -> tuple[int, int, int] | None:
    """Differs once a file was written again; None without a file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
