"""Save and load modules that transformers did not make: safetensors and shrink.json."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, cast

from safetensors.torch import load_model, save_model
from torch import nn

from hf_shrink.checkpoint.packed import packed_schemes
from hf_shrink.checkpoint.record import RECORD_NAME, ShrinkRecord, hf_shrink_version
from hf_shrink.checkpoint.shards import read_header, read_json
from hf_shrink.checkpoint.skeleton import empty_compressed
from hf_shrink.errors import CheckpointError, ShrinkError
from hf_shrink.plan import Scheme
from hf_shrink.runtime import PackedModule

WEIGHTS = "model.safetensors"
M = TypeVar("M", bound=nn.Module)


def save_module(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write any `torch.nn.Module`, packed or not, into a folder as model.safetensors and shrink.json.

    shrink.json holds the schemes of the packed modules, and the record when the module has a `shrink_record`.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    save_model(module, str(folder / WEIGHTS), metadata={"format": "pt"})
    record = getattr(module, "shrink_record", None)
    content: dict[str, Any] = (
        record.to_dict() if isinstance(record, ShrinkRecord) else {"hf_shrink_version": hf_shrink_version()}
    )
    content["schemes"] = {name: asdict(scheme) for name, scheme in packed_schemes(module).items()}
    (folder / RECORD_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load_module(module: M | Callable[[], M], path: str | os.PathLike[str]) -> M:
    """The inverse of `save_module`.

    Args:
        module: the dense module, whose weights are replaced in place, or its class (or any function) that makes one
            when called without arguments.
        path: the folder that `save_module` wrote.

    Returns:
        The module, with packed modules where the saved one had them.

    Raises:
        CheckpointError: files are missing or damaged, or were saved from another module.
    """
    folder = Path(path)
    for name in (WEIGHTS, RECORD_NAME):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no {name}; give a folder that save_module wrote")
    read_header(folder / WEIGHTS)
    loaded = cast(M, module if isinstance(module, nn.Module) else module())
    for name, scheme in _schemes(folder / RECORD_NAME).items():
        try:
            dense = loaded.get_submodule(name)
        except AttributeError as error:
            raise CheckpointError(
                f"{folder} was saved from another module: this one has no {name}; build it as it was when saved"
            ) from error
        if not (isinstance(dense, PackedModule) and dense.scheme == scheme):
            loaded.set_submodule(name, empty_compressed(dense, scheme))
    try:
        load_model(loaded, folder / WEIGHTS, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder} was saved from another module: {' '.join(str(error).split())}; build it as it was when saved"
        ) from error
    return loaded


def _schemes(path: Path) -> dict[str, Scheme]:
    try:
        return {name: Scheme(**fields) for name, fields in read_json(path)["schemes"].items()}
    except (KeyError, TypeError, AttributeError, ShrinkError) as error:
        raise CheckpointError(
            f"{path} names no valid schemes ({error}); give a folder that save_module wrote"
        ) from error
